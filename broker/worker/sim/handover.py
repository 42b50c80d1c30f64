"""What a simulated prefill leaves for its decode, and the way to it.

It waits under a key at `GET /sim/transfer/{key}?wait_s=N` of the prefill's HTTP port, to be taken once. Decode computes
the proof again from its own copy of the prompt: another prompt or another prefill cannot have the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections import OrderedDict

import msgspec

from broker.worker.request import EngineError
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
    """Also of its bootstrap server, its connector and its ZMQ address: the simulation has one socket for all."""
    role: str
    dialect: str
    connector: str
    device_ids: tuple[str, ...] = ("0",)
    rdma_ports: tuple[str, ...] = ()


def proof_of(prompt: Prompt, name: str, key: str) -> Proof:
    source = b"\0".join((prompt.digest, name.encode(), key.encode()))
    return Proof(name, hashlib.blake2b(source, digest_size=16).hexdigest())


def engine_id(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, name))


def check(proof: Proof, prompt: Prompt, key: str) -> None:
    if proof != proof_of(prompt, proof.name, key):
        raise EngineError(400, "the prefill computed another prompt")


async def fetch(host: str, port: int, key: str, wait_s: float = WAIT_S) -> Proof:
    """Asks a prefill instance for what it computed. Raises `EngineError` 500 when it does not come."""
    try:
        async with asyncio.timeout(WAIT_S + 1):
            reader, writer = await asyncio.open_connection(host.strip("[]"), port)
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
