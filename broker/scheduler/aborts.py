"""Ends requests wherever they are: FastDeploy's engines are told, then every frontend is asked.

    frontend --AbortRequests--> scheduler --POST, once--> FastDeploy engines       they end what they know, and count
                                          --EndRequests-> every frontend           they close what is still open
             <-----Reply------            <-Ended--------

Engines first: their own end of a stream reaches the client then, and frontends close what no engine has ended (vLLM
and SGLang by closing the connection, native engines by Abort).
"""

from __future__ import annotations

import asyncio

import msgspec

from broker import aborting, wire
from broker.aborting import Aborted, Failure
from broker.errors import BadRequest
from broker.scheduler.asking import FRONTENDS_S, Asking
from broker.scheduler.collect import Collector
from broker.scheduler.registry import Registry
from broker.table import State
from broker.types import EngineKind, Instance, Role

ENGINES_S = 2.0
_NO_ROUTE = frozenset((404, 405, 501))
"""Of a server of unknown make: it has no such route, and its connections are closed by the frontends."""


class Aborts:
    """Ends requests; owns nothing."""

    def __init__(self, registry: Registry, collector: Collector, asking: Asking) -> None:
        self._registry = registry
        self._collector = collector
        self._asking = asking

    async def answer(self, body: bytes) -> tuple[int, bytes]:
        """Status and JSON body for the body of a `POST /v1/abort_requests`."""
        try:
            asked = aborting.wanted(body)
        except BadRequest as e:
            return e.status, msgspec.json.encode({"error": e.message})
        engines, failures = await self._tell_engines(body)
        ended, silent = await self._ask_frontends(asked)
        return 200, msgspec.json.encode(aborting.merged(asked, ended, engines, [*failures, *silent]))

    async def _tell_engines(self, body: bytes) -> tuple[list[Aborted], list[Failure]]:
        """The body unchanged, once, to everyone who may know the route. Decode's word comes last and counts."""
        instances = [
            m.instance
            for m in self._registry
            if m.state is not State.DOWN and m.instance.engine in (EngineKind.FASTDEPLOY, EngineKind.OPENAI)
        ]
        instances.sort(key=lambda instance: instance.role is not Role.PREFILL)
        answers = await asyncio.gather(*(self._tell_engine(instance, body) for instance in instances))
        aborted = [entry for answer in answers if isinstance(answer, list) for entry in answer]
        return aborted, [answer for answer in answers if isinstance(answer, Failure)]

    async def _tell_engine(self, instance: Instance, body: bytes) -> list[Aborted] | Failure:
        try:
            async with asyncio.timeout(ENGINES_S):
                answer = await self._collector.post(instance.url + "/v1/abort_requests", body)
        except TimeoutError:
            return Failure(instance.url, f"no answer within {ENGINES_S:g} s")
        if answer is None:
            return Failure(instance.url, "no answer")
        if answer.status in _NO_ROUTE and instance.engine is EngineKind.OPENAI:
            return []
        if answer.status != 200:
            return Failure(instance.url, f"status {answer.status}: {answer.body[:200].decode(errors='replace')}")
        return aborting.read_result(answer.body)

    async def _ask_frontends(self, asked: list[str] | None) -> tuple[list[Aborted], list[Failure]]:
        parts, silent = await self._asking.ask(lambda ask: wire.EndRequests(ask, asked or [], every=asked is None))
        ended = [Aborted(*entry) for part in parts if isinstance(part, wire.Ended) for entry in part.requests]
        return ended, [Failure("frontend", f"no answer within {FRONTENDS_S:g} s")] * silent
