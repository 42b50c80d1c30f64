"""A frontend with prefill/decode pairs: real table, choice and forwarding; transports, clients and time are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, cast

from broker.config import Server
from broker.counters import CounterColumn
from broker.engines.pd import PAIRINGS
from broker.errors import PenstockError
from broker.route import RouteRequest
from broker.types import EngineKind, FastDeployFields, Instance, Role
from frontend.forward import Forward
from frontend.forwarder import Forwarder
from frontend.pair import Pairer, Terms
from frontend.partners import Partners
from frontend.upstream.base import Sink, UpstreamRequest
from tests.frontend.fakes import FakeCall, Frontend, Time

BODY = b'{"model":"tiny", "prompt":"hello", "max_tokens": 7, "big": 9007199254740993}'
GIVEN = b'{"do_remote_prefill": true, "remote_block_ids":[[ 1,2]], "remote_port":9007199254740993}'
ANSWER = b'{"id":"x", "kv_transfer_params": ' + GIVEN + b', "usage":null}'
"""What a prefill of NIXL answers, and what of it decode is asked with."""


class SoonTime(Time):
    """What is called soon waits for the next `advance`."""

    def call_soon(self, call: Callable[..., None], *args: object) -> None:
        self.call_later(0.0, lambda: call(*args))


class PairFrontend(Frontend):
    """`http://p<n>:80` and `http://d<n>:80`, of one kind."""

    def __init__(
        self,
        path: Path,
        engine: EngineKind,
        prefills: int = 2,
        decodes: int = 2,
        terms: Terms | None = None,
        **sections: Any,
    ) -> None:
        super().__init__(path, server=Server(splitwise=True), **sections)
        self.engine = engine
        for role, letter, count in ((Role.PREFILL, "p", prefills), (Role.DECODE, "d", decodes)):
            for n in range(count):
                self.admit(f"http://{letter}{n}:80", role)
        self.time = SoonTime()
        loop = cast("asyncio.AbstractEventLoop", self.time)
        pairer = Pairer(self.dispatcher, Partners(self.run.reader, PAIRINGS), PAIRINGS, Random(1), loop, terms)
        self.forwarder = Forwarder(self.config, pairer, self.counters, self.http, self.native, loop, self.time.time)

    def admit(self, url: str, role: Role, **fields: Any) -> int:
        fields = {"engine": self.engine, "models": ("tiny",), "fastdeploy": FastDeployFields(tp_size=1), **fields}
        slot = self.slots[url] = self.run.writer.admit(Instance(url=url, role=role, **fields), self.run.clock())
        return slot

    def pair(self, *, stream: bool = True, body: bytes = BODY, sink: Sink | None = None) -> Forward:
        """A request, begun."""
        route = RouteRequest(model="tiny", prompt_tokens=10)
        request = UpstreamRequest(
            path="/v1/completions", headers=[(b"x-request-id", b"id-1")], body=body, stream=stream, request_id="r-1"
        )
        forward = self.forwarder.forward(b"id-1", route, request, sink or self.client)
        forward.begin()
        return forward

    # -- what is under way -------------------------------------------------------------------------------------

    def legs(self, letter: str) -> list[FakeCall]:
        """Calls to prefill (`p`) or decode (`d`) instances, in order."""
        return [call for call in self.http.calls if call.instance.url.startswith(f"http://{letter}")]

    @property
    def prefill(self) -> FakeCall:
        return self.legs("p")[-1]

    @property
    def decode(self) -> FakeCall:
        return self.legs("d")[-1]

    def held(self, letter: str) -> int:
        """Requests in flight at the instances of a role."""
        return sum(
            self.run.reader.counters.in_flight(slot)[0]
            for url, slot in self.slots.items()
            if url.startswith(f"http://{letter}")
        )

    def held_tokens(self, letter: str) -> int:
        return sum(
            self.run.reader.counters.in_flight(slot)[1]
            for url, slot in self.slots.items()
            if url.startswith(f"http://{letter}")
        )

    def counted_at(self, url: str, column: CounterColumn) -> int:
        return self.counters.load(column, self.slots[url])


def held(frontend: PairFrontend) -> tuple[int, int]:
    return frontend.held("p"), frontend.held("d")


def failed(frontend: PairFrontend) -> PenstockError:
    (error,) = frontend.client.heard
    assert isinstance(error, PenstockError)
    return error
