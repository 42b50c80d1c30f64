"""Any order of events in the life of requests: what is held is always exactly what is under way."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.config import Timeouts, Upstream
from broker.counters import CounterColumn, TotalColumn
from broker.errors import (
    BadRequest,
    ClientTooSlow,
    ConnectFailed,
    EngineSaturated,
    PenstockError,
    UpstreamBroken,
    UpstreamTimeout,
)
from broker.table import State
from frontend.forward import Forward
from frontend.upstream.base import Headers, Sink
from tests.frontend.fakes import FakeCall, Frontend

ERRORS = (ConnectFailed, UpstreamBroken, EngineSaturated, UpstreamTimeout, BadRequest, ClientTooSlow)
STATUSES = st.sampled_from((200, 204, 404, 429, 500, 502, 503, 504))


class Client(Sink):
    """A client's sink that holds the forward to its contract, and may leave in the middle of what it is told."""

    def __init__(self, leaves_at: str) -> None:
        self.leaves_at = leaves_at
        self.forward: Forward | None = None
        self.started = False
        self.ended = False
        self.left = False

    def start(self, status: int, headers: Headers) -> None:
        assert not self.started
        self._hear("start")
        self.started = True

    def write(self, data: bytes) -> None:
        assert self.started
        self._hear("write")

    def finish(self) -> None:
        assert self.started
        self._hear("finish")
        self.ended = True

    def fail(self, error: PenstockError) -> None:
        self._hear("fail")
        self.ended = True

    def leave(self) -> None:
        self.left = True
        assert self.forward is not None
        self.forward.cancel()

    def _hear(self, what: str) -> None:
        assert not self.ended, f"{what} after the end"
        assert not self.left, f"{what} after the client left"
        if what == self.leaves_at:
            self.leave()


class Life(RuleBasedStateMachine):
    """Three instances, any number of requests, engines that do whatever the transport's contract allows."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        self.frontend = Frontend(
            Path(self._directory.name),
            *(f"http://10.0.0.{n}:80" for n in range(3)),
            timeouts=Timeouts(first_byte_secs=30, idle_secs=10),
            upstream=Upstream(attempts=3, breaker_failures=2),
        )
        self.clients: list[Client] = []
        self.begun = 0
        self.answering: set[int] = set()  # calls that have heard their engine's status
        self.over: set[int] = set()  # calls that their engine has ended

    def teardown(self) -> None:
        for client in self.clients:
            client.leave()
        self.nothing_is_held_but_what_is_under_way()
        self.frontend.close()
        self._directory.cleanup()

    @property
    def open_calls(self) -> list[tuple[int, FakeCall]]:
        calls = enumerate(self.frontend.http.calls)
        return [(n, call) for n, call in calls if not call.cancelled and n not in self.over]

    # -- clients -----------------------------------------------------------------------------------------------

    @rule(leaves_at=st.sampled_from(("never", "never", "start", "write", "finish", "fail")), tokens=st.integers(0, 9))
    def begin(self, leaves_at: str, tokens: int) -> None:
        client = Client(leaves_at)
        client.forward = self.frontend.forward(tokens=tokens, sink=client)
        self.clients.append(client)
        self.begun += 1
        client.forward.begin()

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), twice=st.booleans())
    def leave(self, data: st.DataObject, twice: bool) -> None:
        client = data.draw(st.sampled_from(self.clients))
        client.leave()
        if twice:
            client.leave()

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), pause=st.booleans())
    def keep_up_or_not(self, data: st.DataObject, pause: bool) -> None:
        forward = data.draw(st.sampled_from(self.clients)).forward
        assert forward is not None
        forward.pause() if pause else forward.resume()

    # -- engines -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data(), status=STATUSES)
    def answer(self, data: st.DataObject, status: int) -> None:
        number, call = data.draw(st.sampled_from(self.open_calls))
        if number not in self.answering:
            self.answering.add(number)
            call.sink.start(status, [])

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data())
    def stream(self, data: st.DataObject) -> None:
        number, call = data.draw(st.sampled_from(self.open_calls))
        if number in self.answering:
            call.sink.write(b"chunk")

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        number, call = data.draw(st.sampled_from(self.open_calls))
        self.over.add(number)
        call.sink.finish()

    @precondition(lambda self: self.open_calls)
    @rule(data=st.data(), error=st.sampled_from(ERRORS))
    def fail(self, data: st.DataObject, error: type[PenstockError]) -> None:
        number, call = data.draw(st.sampled_from(self.open_calls))
        self.over.add(number)
        call.sink.fail(error("it happened"))

    # -- the rest of the world ---------------------------------------------------------------------------------

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.frontend.time.advance(seconds)

    @rule(slot=st.integers(0, 2), state=st.sampled_from((State.READY, State.DOWN)))
    def change_fleet(self, slot: int, state: State) -> None:
        self.frontend.run.writer.set_state(slot, state)

    @rule()
    def stop(self) -> None:
        self.frontend.forwarder.end_all(PenstockError("stopping"))

    # -- what always holds -------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_held_but_what_is_under_way(self) -> None:
        frontend = self.frontend
        live = len(frontend.forwarder.live)
        assert live == sum(not client.ended and not client.left for client in self.clients)
        assert sum(frontend.in_flight) == live
        assert len(self.open_calls) == live
        assert frontend.time.pending <= live  # one timer per request
        opened, closed = frontend.total(TotalColumn.STREAMS_OPENED), frontend.total(TotalColumn.STREAMS_CLOSED)
        assert opened - closed == live

    @invariant()
    def every_request_is_accounted_for_once(self) -> None:
        frontend = self.frontend
        responses = (TotalColumn.RESPONSES_2XX, TotalColumn.RESPONSES_4XX, TotalColumn.RESPONSES_5XX)
        ended = self.begun - len(frontend.forwarder.live)
        assert sum(frontend.total(column) for column in responses) == ended
        refused = frontend.total(TotalColumn.NO_INSTANCE)
        statuses = range(CounterColumn.STATUS_200, CounterColumn.STATUS_OTHER + 1)
        assert sum(frontend.counted(CounterColumn(status)) for status in statuses) == ended - refused
        retried = frontend.counted(CounterColumn.RETRIED)
        assert frontend.counted(CounterColumn.STARTED) == self.begun - refused + retried
        assert retried <= 2 * self.begun


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40)
