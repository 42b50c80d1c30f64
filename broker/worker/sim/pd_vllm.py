"""vLLM's connectors as the simulated engine has them: NIXL, Mooncake, P2P-NCCL."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from broker.worker.request import EngineError, Request
from broker.worker.sim.engine import Transfer
from broker.worker.sim.handover import Handover, Identity, check, engine_id, fetch, proof_of
from broker.worker.sim.text import Prompt

# -- NixlConnector -----------------------------------------------------------------------------------------


async def nixl(me: Identity, handover: Handover, request: Request, prompt: Prompt) -> Transfer:
    """Prefill answers an object; decode wants it back, unchanged."""
    if me.role == "prefill":
        return _nixl_prefill(me, handover, request, prompt)
    return await _nixl_decode(request, prompt)


def nixl_object(name: str, host: str, port: int, prompt: Prompt, request_id: str) -> dict[str, Any]:
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


def _nixl_prefill(me: Identity, handover: Handover, request: Request, prompt: Prompt) -> Transfer:
    asked = request.body.get("kv_transfer_params")
    if not isinstance(asked, dict) or asked.get("do_remote_decode") is not True:
        return Transfer(extra={"kv_transfer_params": None})
    if request.stream:  # as vLLM 0.32: the tokens come, the parameters do not
        return Transfer()
    key = f"cmpl-{request.headers.get('x-request-id', request.id)}-0-{uuid.uuid4().hex[:8]}"
    return Transfer(
        extra={"kv_transfer_params": nixl_object(me.name, me.host, me.port, prompt, key)},
        on_prefilled=lambda: handover.put(key, proof_of(prompt, me.name, key)),
    )


async def _nixl_decode(request: Request, prompt: Prompt) -> Transfer:
    given = request.body.get("kv_transfer_params")
    if not isinstance(given, dict):
        raise EngineError(400, "decode needs the kv_transfer_params of its prefill's answer")
    key, host, port = (given.get(k) for k in ("remote_request_id", "remote_host", "remote_port"))
    if not isinstance(key, str) or not isinstance(host, str) or type(port) is not int:
        raise EngineError(400, "kv_transfer_params lacks remote_request_id, remote_host or remote_port")
    proof = await fetch(host, port, key, wait_s=0)  # the prefill has answered already
    if given != nixl_object(proof.name, host, port, prompt, key) or proof != proof_of(prompt, proof.name, key):
        raise EngineError(400, "kv_transfer_params is not what this prefill answered for this prompt")
    return Transfer(data=transfer_data(given), extra={"kv_transfer_params": None})


def transfer_data(given: Mapping[str, Any]) -> bytes:
    """The seed that a vLLM-like decode mixes into its words."""
    return json.dumps(given, sort_keys=True).encode()


# -- MooncakeConnector -------------------------------------------------------------------------------------


async def mooncake(me: Identity, handover: Handover, request: Request, prompt: Prompt) -> Transfer:
    """Both at once; decode finds prefill by its bootstrap address, and must name its engine id."""
    given = request.body.get("kv_transfer_params")
    name = given.get("transfer_id") if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(name, str) or not name.startswith("xfer-"):
        raise EngineError(400, "kv_transfer_params with a transfer_id is needed")
    if me.role == "prefill":
        if given != {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": name}:
            raise EngineError(400, "kv_transfer_params is not what a prefill is given")
        _one_token(request)
        return Transfer(on_prefilled=lambda: handover.put(name, proof_of(prompt, me.name, name)))
    address = re.fullmatch(r"http://(.+):(\d+)", str(given.get("remote_bootstrap_addr")))
    wanted = {"do_remote_decode": False, "do_remote_prefill": True, "transfer_id": name}
    engine = given.get("remote_engine_id")
    if address is None or {k: v for k, v in given.items() if not k.startswith("remote_")} != wanted:
        raise EngineError(400, "kv_transfer_params is not what a decode is given")
    proof = await fetch(address[1], int(address[2]), name)
    if engine != engine_id(proof.name):
        raise EngineError(500, f"the engine {engine} is not at {address[0]}")
    check(proof, prompt, name)
    return Transfer(data=proof.proof.encode())


# -- P2pNcclConnector --------------------------------------------------------------------------------------

_P2P_ID = re.compile(r"___prefill_addr_(.+):(\d+)___decode_addr_(.+):(\d+)_[0-9a-f]{32}")


async def p2p_nccl(me: Identity, handover: Handover, request: Request, prompt: Prompt) -> Transfer:
    """One after the other; everything is in the request id, to which vLLM adds the kind of the path."""
    name = request.headers.get("x-request-id", "")
    found = _P2P_ID.fullmatch(name)
    if found is None:
        raise EngineError(400, f"the request id {name!r} holds no addresses")
    mine = found[1], int(found[2])
    if me.role == "decode":
        mine = found[3], int(found[4])
    if mine != (me.host, me.port):
        raise EngineError(400, f"the request id has {mine[0]}:{mine[1]} for this instance")
    key = f"{prompt.kind}-{name}"
    if me.role == "prefill":
        _one_token(request)
        return Transfer(on_prefilled=lambda: handover.put(key, proof_of(prompt, me.name, key)))
    proof = await fetch(found[1], int(found[2]), key, wait_s=0)
    check(proof, prompt, key)
    return Transfer(data=proof.proof.encode())


def _one_token(request: Request) -> None:
    body = request.body
    if body.get("max_tokens") != 1 or body.get("max_completion_tokens", 1) != 1 or body.get("stream"):
        raise EngineError(400, "a prefill is asked for one token, not as a stream")
