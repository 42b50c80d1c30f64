"""Registration as vLLM's P2pNcclConnector does it: a DEALER says every 3 s who it is, and expects no answer.

    [identity, msgpack {"type": "P" | "D", "http_address": "ip:port", "zmq_address": "ip:port"}]

Nobody says goodbye: who misses three beats is dropped. The ROUTER is bound only where `engines.p2p-nccl-bind` says.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import msgspec

from broker.errors import UNDECODABLE, PenstockError, WireError
from broker.scheduler.collect import Errands
from broker.scheduler.fields import parse
from broker.scheduler.registration import Registration
from broker.scheduler.registry import SECOND_NS, Registry
from broker.scheduler.tally import Tally
from broker.types import Connector, EngineKind

logger = logging.getLogger("scheduler")

SILENT_NS = 10 * SECOND_NS
"""Three missed beats, and some slack."""
MAX_BEAT_BYTES = 4096

_ROLES = {"P": "prefill", "D": "decode"}


class Beat(msgspec.Struct):
    """What an engine says of itself; unknown keys are ignored."""

    type: str
    http_address: str
    zmq_address: str


def registration(frame: bytes, splitwise: bool) -> Registration:
    """Raises `WireError` for what is no beat, `BadRegistration` for one that cannot be used."""
    try:
        beat = msgspec.msgpack.decode(frame[:MAX_BEAT_BYTES], type=Beat)
    except UNDECODABLE as e:
        raise WireError(f"malformed registration: {e}") from e
    if beat.type not in _ROLES:
        raise WireError(f"an engine of type {beat.type[:20]!r}; P and D are known")
    host, _, port = beat.http_address.rpartition(":")
    fields = {
        "role": _ROLES[beat.type],
        "host_ip": host,
        "port": port,
        "engine": EngineKind.VLLM,
        "connector": Connector.P2P_NCCL,
        "zmq_address": beat.zmq_address,
    }
    return parse(fields, splitwise)


class P2pNcclBeats:
    """Owner of the beats heard, and of the registrations they start."""

    def __init__(
        self,
        registry: Registry,
        register: Callable[[Registration], Awaitable[object]],
        tally: Tally,
        splitwise: bool,
    ) -> None:
        """`register` is the registrar's: it probes newcomers."""
        self._registry = registry
        self._register = register
        self._tally = tally
        self._splitwise = splitwise
        self._heard_ns: dict[str, int] = {}
        self._errands = Errands()

    def hear(self, frame: bytes, now_ns: int) -> None:
        """One beat. Raises `WireError`."""
        try:
            asked = registration(frame, self._splitwise)
        except WireError:
            raise
        except PenstockError as e:
            raise WireError(e.message) from e
        self._heard_ns[asked.instance.url] = now_ns
        self._errands.start(asked.instance.url, self._try(asked))

    def tick(self, now_ns: int) -> list[str]:
        """Drops who fell silent; their URLs."""
        silent = [url for url, heard_ns in self._heard_ns.items() if now_ns - heard_ns > SILENT_NS]
        for url in silent:
            del self._heard_ns[url]
            if self._registry.leave(url, now_ns):
                logger.warning("%s says no more that it is there, and is dropped", url)
        return silent

    async def close(self) -> None:
        await self._errands.close()

    async def _try(self, asked: Registration) -> None:
        url = asked.instance.url
        try:
            await self._register(asked)
        except PenstockError as e:
            if self._tally.first(("p2p_nccl", url)):
                logger.warning("%s is not registered yet: %s", url, e.message)
