"""Prefill/decode disaggregation as each connector does it, small but strict.

    connector            key                      where decode looks for what prefill computed
    nixl                 remote_request_id        remote_host:remote_port of `kv_transfer_params`  (sequential)
    mooncake             transfer_id              remote_bootstrap_addr                            (both at once)
    p2p_nccl             the request's id         the address within it                            (sequential)
    bootstrap            bootstrap_room           bootstrap_host:bootstrap_port                    (both at once)
    disaggregate_info    request_id               prefill_ip:prefill_connector_port                (both at once)
    native               x-request-id             `sim` in the peer's transfer metadata            (sequential)

Decode computes the proof again from its own copy of the prompt (`handover.py`), so another prompt, another prefill or
a changed object is an error, and its words depend on what it was given.
"""

from __future__ import annotations

import msgspec

from broker.worker.endpoints import host_and_port
from broker.worker.request import EngineError, Request
from broker.worker.sim.engine import Transfer
from broker.worker.sim.handover import WAIT_S, Handover, Identity, Proof, check, fetch, proof_of
from broker.worker.sim.pd_vllm import mooncake, nixl, p2p_nccl, transfer_data
from broker.worker.sim.text import Prompt

__all__ = [
    "CONNECTORS",
    "WAIT_S",
    "Handover",
    "Identity",
    "Proof",
    "Transfer",
    "begin",
    "metadata",
    "native",
    "proof_of",
    "transfer_data",
]

CONNECTORS = {"vllm": "nixl", "sglang": "bootstrap", "fastdeploy": "disaggregate_info", "openai": ""}
"""By dialect, unless another one is named."""


async def begin(me: Identity, handover: Handover, request: Request, prompt: Prompt) -> Transfer:
    """What disaggregation adds to a request over HTTP. Raises `EngineError`; waits for the prefill where it must."""
    if me.role == "mixed" or prompt.kind == "embedding":
        return Transfer()
    ways = {
        "nixl": nixl,
        "mooncake": mooncake,
        "p2p_nccl": p2p_nccl,
        "bootstrap": _sglang,
        "disaggregate_info": _fastdeploy,
    }
    way = ways.get(me.connector)
    if way is None:
        raise EngineError(400, f"the dialect {me.dialect} has no prefill/decode form")
    return await way(me, handover, request, prompt)


# -- Penstock's own ----------------------------------------------------------------------------------------


class _Metadata(msgspec.Struct):
    """The transfer metadata that a simulated native engine registers when it is given none."""

    sim: str
    """`host:port` of its HTTP side."""


def metadata(me: Identity) -> bytes:
    return msgspec.json.encode(_Metadata(f"{me.host}:{me.port}"))


async def native(me: Identity, handover: Handover, request: Request, prompt: Prompt) -> Transfer:
    """Each half is given the other's metadata. Raises `EngineError`."""
    if me.role == "mixed":
        return Transfer()
    if not request.transfer and me.role == "decode":
        raise EngineError(400, "decode needs the transfer metadata of its prefill instance")
    try:
        address = msgspec.json.decode(request.transfer, type=_Metadata).sim
        host, port = host_and_port(address)
    except (
        msgspec.DecodeError,
        UnicodeDecodeError,
        ValueError,
    ):  # somebody's own metadata: it can only be shown in the words
        return Transfer(data=request.transfer, prefill_only=me.role == "prefill")
    key = request.headers.get("x-request-id", "")
    if me.role == "prefill":
        return Transfer(prefill_only=True, on_prefilled=lambda: handover.put(key, proof_of(prompt, me.name, key)))
    proof = await fetch(host, port, key, wait_s=0)
    check(proof, prompt, key)
    return Transfer(data=proof.proof.encode())


# -- SGLang ------------------------------------------------------------------------------------------------


async def _sglang(me: Identity, handover: Handover, request: Request, prompt: Prompt) -> Transfer:
    host, port, room = (request.body.get(f"bootstrap_{k}") for k in ("host", "port", "room"))
    if not isinstance(host, str) or type(port) is not int or type(room) is not int or not 0 <= room < 2**63:
        raise EngineError(400, "bootstrap_host, bootstrap_port and bootstrap_room are needed")
    key = str(room)
    if me.role == "prefill":
        if port != me.port:
            raise EngineError(400, f"bootstrap_port {port} is another instance's")
        return Transfer(prefill_only=True, on_prefilled=lambda: handover.put(key, proof_of(prompt, me.name, key)))
    proof = await fetch(host, port, key)
    check(proof, prompt, key)
    return Transfer(data=proof.proof.encode())


# -- FastDeploy --------------------------------------------------------------------------------------------

FASTDEPLOY_KEYS = (
    "prefill_ip",
    "decode_ip",
    "prefill_connector_port",
    "decode_connector_port",
    "decode_device_ids",
    "decode_rdma_ports",
    "transfer_protocol",
    "decode_tp_size",
)


async def _fastdeploy(me: Identity, handover: Handover, request: Request, prompt: Prompt) -> Transfer:
    info, key = request.body.get("disaggregate_info"), request.body.get("request_id")
    if not isinstance(info, dict) or not isinstance(key, str) or not key:
        raise EngineError(400, "disaggregate_info and request_id are needed")
    missing = [k for k in FASTDEPLOY_KEYS if k not in info]
    if missing:
        raise EngineError(400, f"disaggregate_info lacks {', '.join(missing)}")
    mine = {f"{me.role}_ip": me.host, f"{me.role}_connector_port": me.port}
    if me.role == "decode":
        mine |= {"decode_device_ids": list(me.device_ids), "decode_rdma_ports": list(me.rdma_ports)}
    for k, value in mine.items():
        if info[k] != value:
            raise EngineError(400, f"disaggregate_info.{k} is {info[k]!r}, this instance has {value!r}")
    if me.role == "prefill":
        return Transfer(prefill_only=True, on_prefilled=lambda: handover.put(key, proof_of(prompt, me.name, key)))
    host, port = info["prefill_ip"], info["prefill_connector_port"]
    if not isinstance(host, str) or type(port) is not int:
        raise EngineError(400, "disaggregate_info.prefill_ip or prefill_connector_port has the wrong type")
    proof = await fetch(host, port, key)
    check(proof, prompt, key)
    return Transfer(data=proof.proof.encode())
