"""Prefill/decode disaggregation as each dialect does it, small but strict.

What a prefill computed waits under a key at `GET /sim/transfer/{key}?wait_s=N` of its HTTP port, to be taken once:

    dialect     key                      where decode looks for it
    vllm        remote_request_id        remote_host:remote_port of `kv_transfer_params`     (sequential, NIXL)
    sglang      bootstrap_room           bootstrap_host:bootstrap_port                       (both at once)
    fastdeploy  request_id               prefill_ip:prefill_connector_port                   (both at once)
    native      (none)                   the peer's transfer metadata in the request

Decode recomputes the proof from its own copy of the prompt, so another prompt, another prefill or a changed object
is an error, and its words depend on the object it was given.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import msgspec

from broker.worker.request import EngineError, Request
from broker.worker.sim.engine import Transfer
from broker.worker.sim.text import Prompt

WAIT_S = 10.0
"""How long a decode waits for its prefill."""
KEPT = 4096
"""Computed prompts that wait to be fetched; the oldest goes first."""


class Proof(msgspec.Struct, frozen=True):
    """What stands for the KV blocks: shows which prefill computed which prompt."""

    name: str
    proof: str


class Handover:
    """Prompts computed here and waiting for their decode. Owner: the HTTP shell of a prefill instance."""

    def __init__(self) -> None:
        self._ready: OrderedDict[str, Proof] = OrderedDict()
        self._waiters: dict[str, asyncio.Future[Proof]] = {}

    def put(self, key: str, proof: Proof) -> None:
        waiter = self._waiters.pop(key, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(proof)
            return
        self._ready[key] = proof
        if len(self._ready) > KEPT:
            self._ready.popitem(last=False)

    async def take(self, key: str, wait_s: float = WAIT_S) -> Proof | None:
        """Once per key; None when it does not come in time."""
        if (proof := self._ready.pop(key, None)) is not None:
            return proof
        waiter = self._waiters.setdefault(key, asyncio.get_running_loop().create_future())
        try:
            return await asyncio.wait_for(asyncio.shield(waiter), wait_s)
        except TimeoutError:
            return None
        finally:
            self._waiters.pop(key, None)


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who this instance is to its peers."""

    name: str
    host: str
    port: int
    role: str
    dialect: str
    device_ids: tuple[str, ...] = ("0",)
    rdma_ports: tuple[str, ...] = ()


def proof_of(prompt: Prompt, name: str, key: str) -> Proof:
    source = b"\0".join((prompt.digest, name.encode(), key.encode()))
    return Proof(name, hashlib.blake2b(source, digest_size=16).hexdigest())


def engine_id(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, name))


def native(role: str, request: Request) -> Transfer:
    """The native form: the peer's metadata comes with the request. Raises `EngineError` when decode has none."""
    if role == "decode" and not request.transfer:
        raise EngineError(400, "decode needs the transfer metadata of its prefill instance")
    return Transfer(data=request.transfer, prefill_only=role == "prefill")


async def begin(me: Identity, handover: Handover, request: Request, prompt: Prompt) -> Transfer:
    """What disaggregation adds to a request over HTTP. Raises `EngineError`; waits for the prefill where it must."""
    if me.role == "mixed" or prompt.kind == "embedding":
        return Transfer()
    if me.dialect == "vllm":
        return (
            _vllm_prefill(me, handover, request, prompt)
            if me.role == "prefill"
            else await _vllm_decode(request, prompt)
        )
    if me.dialect == "sglang":
        return await _sglang(me, handover, request, prompt)
    if me.dialect == "fastdeploy":
        return await _fastdeploy(me, handover, request, prompt)
    raise EngineError(400, f"the dialect {me.dialect} has no prefill/decode form")


# -- vLLM, NixlConnector -----------------------------------------------------------------------------------


def _vllm_object(name: str, host: str, port: int, prompt: Prompt, request_id: str) -> dict[str, Any]:
    blocks = -(-len(prompt.tokens) // 16)
    first = prompt.digest[0]
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [list(range(first, first + blocks))],
        "remote_engine_id": engine_id(name),
        "remote_request_id": request_id,
        "remote_host": host,
        "remote_port": port,
        "tp_size": 1,
        "remote_num_tokens": len(prompt.tokens),
        "dcp_size": 1,
        "pp_size": 1,
        "remote_blocks_expiry_time": None,
        "transfer_mode": "pull",
        "remote_prefill_cached_tokens": 0,
    }


def _vllm_prefill(me: Identity, handover: Handover, request: Request, prompt: Prompt) -> Transfer:
    asked = request.body.get("kv_transfer_params")
    if not isinstance(asked, dict) or asked.get("do_remote_decode") is not True:
        return Transfer(extra={"kv_transfer_params": None})
    if request.stream:  # as vLLM 0.32: the tokens come, the parameters do not
        return Transfer()
    key = f"cmpl-{request.headers.get('x-request-id', request.id)}-0-{uuid.uuid4().hex[:8]}"
    return Transfer(
        extra={"kv_transfer_params": _vllm_object(me.name, me.host, me.port, prompt, key)},
        on_prefilled=lambda: handover.put(key, proof_of(prompt, me.name, key)),
    )


async def _vllm_decode(request: Request, prompt: Prompt) -> Transfer:
    given = request.body.get("kv_transfer_params")
    if not isinstance(given, dict):
        raise EngineError(400, "decode needs the kv_transfer_params of its prefill's answer")
    key, host, port = (given.get(k) for k in ("remote_request_id", "remote_host", "remote_port"))
    if not isinstance(key, str) or not isinstance(host, str) or type(port) is not int:
        raise EngineError(400, "kv_transfer_params lacks remote_request_id, remote_host or remote_port")
    proof = await _fetch(host, port, key, wait_s=0)  # the prefill has answered already
    if given != _vllm_object(proof.name, host, port, prompt, key) or proof != proof_of(prompt, proof.name, key):
        raise EngineError(400, "kv_transfer_params is not what this prefill answered for this prompt")
    return Transfer(data=transfer_data(given), extra={"kv_transfer_params": None})


def transfer_data(given: Mapping[str, Any]) -> bytes:
    """The seed that a vLLM-like decode mixes into its words."""
    return json.dumps(given, sort_keys=True).encode()


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
    proof = await _fetch(host, port, key)
    _check(proof, prompt, key)
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
    proof = await _fetch(host, port, key)
    _check(proof, prompt, key)
    return Transfer(data=proof.proof.encode())


# -- the way between the two -------------------------------------------------------------------------------


def _check(proof: Proof, prompt: Prompt, key: str) -> None:
    if proof != proof_of(prompt, proof.name, key):
        raise EngineError(400, "the prefill computed another prompt")


async def _fetch(host: str, port: int, key: str, wait_s: float = WAIT_S) -> Proof:
    """Asks a prefill instance for what it computed. Raises `EngineError` 500 when it does not come."""
    try:
        async with asyncio.timeout(WAIT_S + 1):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(
                    f"GET /sim/transfer/{key}?wait_s={wait_s} HTTP/1.0\r\nHost: {host}:{port}\r\n\r\n".encode()
                )
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise EngineError(500, f"the prefill at {host}:{port} has nothing under {key}")
        return msgspec.json.decode(body, type=Proof)
    except (OSError, TimeoutError, ValueError, msgspec.DecodeError) as e:
        raise EngineError(500, f"no KV transfer from {host}:{port}: {e or type(e).__name__}") from e
