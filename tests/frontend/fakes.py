"""A frontend without sockets: real table, counters, dispatch and forwarding; transports, clients and time are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec

from broker.config import Config
from broker.counters import CounterColumn, FrontendCounters, TotalColumn
from broker.errors import PenstockError
from broker.policies import need_index
from broker.prefix import PrefixIndex, PrefixWriter, create_prefix, run_layout
from broker.route import RouteRequest
from broker.types import EngineKind, Instance, Role
from frontend.breaker import Breaker
from frontend.dispatch import Dispatcher, make_policies
from frontend.forward import Forward
from frontend.forwarder import Forwarder
from frontend.upstream.base import Headers, Sink, Upstream, UpstreamRequest
from tests.support.table import Run


class Timer:
    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Time:
    """What a request asks of its loop, with a clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        timer = Timer(self.now + delay, call)
        self._timers.append(timer)
        return timer

    @property
    def pending(self) -> int:
        self._timers = [t for t in self._timers if not t.cancelled]
        return len(self._timers)

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self.pending and (first := min(self._timers, key=lambda t: t.at)).at <= end:
            self._timers.remove(first)
            self.now = max(self.now, first.at)
            first.call()
        self.now = end


class FakeCall:
    """One attempt, as the transport sees it; the test plays the engine on `sink`."""

    def __init__(self, instance: Instance, request: UpstreamRequest, sink: Sink) -> None:
        self.instance = instance
        self.request = request
        self.sink = sink
        self.cancelled = False
        self.paused = False

    def cancel(self) -> None:
        self.cancelled = True

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def answer(self, *chunks: bytes, status: int = 200, headers: Headers | None = None) -> None:
        self.sink.start(status, headers or [])
        for chunk in chunks:
            self.sink.write(chunk)
        self.sink.finish()


class FakeUpstream(Upstream):
    def __init__(self) -> None:
        self.calls: list[FakeCall] = []

    def open(self, instance: Instance, request: UpstreamRequest, sink: Sink) -> FakeCall:
        call = FakeCall(instance, request, sink)
        self.calls.append(call)
        return call

    def close(self) -> None: ...

    @property
    def last(self) -> FakeCall:
        return self.calls[-1]


class Client(Sink):
    """The client's sink: what it heard, in order."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def start(self, status: int, headers: Headers) -> None:
        self.heard.append(status)

    def write(self, data: bytes) -> None:
        self.heard.append(data)

    def finish(self) -> None:
        self.heard.append("end")

    def fail(self, error: PenstockError) -> None:
        self.heard.append(error)


class Frontend:
    """Everything between the client's sink and the transports, over a real table."""

    def __init__(self, path: Path, *urls: str, model: str = "tiny", slots: int = 8, **sections: Any) -> None:
        self.run = Run(path, slots=slots, frontends=2)
        self.config: Config = msgspec.structs.replace(self.run.config, **sections)
        self.slots = {url: self.run.admit(url, model) for url in urls}
        self.counters: FrontendCounters = self.run.frontend(0)
        self.time = Time()
        self.http, self.native = FakeUpstream(), FakeUpstream()
        self.breaker = Breaker(self.config.upstream.breaker_failures, self.config.upstream.breaker_secs)
        self.prefixes = PrefixIndex.of_run(path, self.config, 0) if self._index(path) else None
        policies = make_policies(self.config, 0, self.prefixes)
        self.dispatcher = Dispatcher(self.run.reader, self.counters, policies, self.breaker)
        loop = cast("asyncio.AbstractEventLoop", self.time)
        self.forwarder = Forwarder(
            self.config, self.dispatcher, self.counters, self.http, self.native, loop, self.time.time
        )
        self.client = Client()

    def _index(self, path: Path) -> bool:
        """Makes the prefix index, if a policy asks for it."""
        if need_index(self.config):
            create_prefix(path, run_layout(self.config))
            PrefixWriter.attach(path, run_layout(self.config), dict.fromkeys(self.slots.values(), 1))
        return need_index(self.config)

    def close(self) -> None:
        self.run.__exit__()

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def admit_native(self, url: str) -> int:
        instance = Instance(url=url, engine=EngineKind.NATIVE, models=("tiny",), role=Role.MIXED)
        return self.run.writer.admit(instance, self.run.clock())

    def forward(self, model: str | None = "tiny", tokens: int = 10, sink: Sink | None = None) -> Forward:
        route = RouteRequest(model=model, prompt_tokens=tokens)
        request = UpstreamRequest(path="/v1/chat/completions", headers=[], body=b"{}")
        return self.forwarder.forward(b"id-1", route, request, sink or self.client)

    def begin(self, **fields: Any) -> Forward:
        forward = self.forward(**fields)
        forward.begin()
        return forward

    # -- what the counters say ---------------------------------------------------------------------------------

    @property
    def in_flight(self) -> list[int]:
        """Requests in flight, by slot."""
        return [self.run.reader.counters.in_flight(slot)[0] for slot in self.slots.values()]

    def counted(self, column: CounterColumn) -> int:
        """Summed over the instances."""
        return sum(self.counters.load(column, slot) for slot in self.slots.values())

    def total(self, column: TotalColumn) -> int:
        cell: int = self.counters.totals[column]
        return cell
