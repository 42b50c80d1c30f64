"""Any order of events in the life of requests at pairs: what is held is always exactly what is under way."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.config import Timeouts
from broker.errors import ConnectFailed, EngineSaturated, PenstockError, UpstreamBroken
from broker.types import EngineKind
from frontend.forward import Forward
from frontend.pair import Terms
from frontend.upstream.base import Headers, Sink
from tests.frontend.fakes import FakeCall
from tests.frontend.pairs import BODY, PairFrontend

ANSWERS = st.sampled_from(
    (
        b'{"kv_transfer_params":{}}',
        b'{"kv_transfer_params":null}',
        b"x",
        b'{"choices":[{"finish_reason":"pd_reschedule"}]}',
    )
)
BODIES = st.sampled_from((BODY, b'{"prompt":["a","b"]}'))
STATUSES = st.sampled_from((200, 200, 400, 429, 500, 501, 502, 503, 504))


class Client(Sink):
    """Holds the forward to its contract."""

    def __init__(self) -> None:
        self.started = self.ended = self.left = False

    def start(self, status: int, headers: Headers) -> None:
        assert not self.started
        self._hear()
        self.started = True

    def write(self, data: bytes) -> None:
        assert self.started
        self._hear()

    def finish(self) -> None:
        assert self.started
        self._hear()
        self.ended = True

    def fail(self, error: PenstockError) -> None:
        self._hear()
        self.ended = True

    def _hear(self) -> None:
        assert not self.ended, "heard something after the end"
        assert not self.left, "heard something after leaving"


class Machine(RuleBasedStateMachine):
    kind = EngineKind.FASTDEPLOY
    terms = Terms()

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.it = PairFrontend(
            Path(self._folder.name), self.kind, terms=self.terms, timeouts=Timeouts(first_byte_secs=10.0)
        )
        self.requests: list[tuple[Forward, Client]] = []
        self.started: set[FakeCall] = set()
        self.ended: set[FakeCall] = set()

    def teardown(self) -> None:
        for forward, client in self.requests:
            client.left = True
            forward.cancel()
        self.nothing_is_left_over()
        self.it.close()
        self._folder.cleanup()

    @property
    def under_way(self) -> list[FakeCall]:
        return [call for call in self.it.http.calls if not call.cancelled and call not in self.ended]

    def one(self, data: st.DataObject) -> FakeCall:
        return data.draw(st.sampled_from(self.under_way))

    @precondition(lambda self: len(self.requests) < 6)
    @rule(stream=st.booleans(), body=BODIES)
    def ask(self, stream: bool, body: bytes) -> None:
        client = Client()
        self.requests.append((self.it.pair(stream=stream, body=body, sink=client), client))

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), status=STATUSES)
    def start(self, data: st.DataObject, status: int) -> None:
        call = self.one(data)
        if call not in self.started:
            self.started.add(call)
            call.sink.start(status, [])

    @precondition(lambda self: self.started.intersection(self.under_way))
    @rule(data=st.data(), answer=ANSWERS)
    def write(self, data: st.DataObject, answer: bytes) -> None:
        call = self.one(data)
        if call in self.started:
            call.sink.write(answer)

    @precondition(lambda self: self.started.intersection(self.under_way))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        call = self.one(data)
        if call in self.started:
            self.ended.add(call)
            call.sink.finish()

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), error=st.sampled_from((ConnectFailed, UpstreamBroken, EngineSaturated)))
    def fail(self, data: st.DataObject, error: type[PenstockError]) -> None:
        call = self.one(data)
        self.ended.add(call)
        call.sink.fail(error("no"))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        forward, client = data.draw(st.sampled_from(self.requests))
        client.left = True
        forward.cancel()

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), slow=st.booleans())
    def pace(self, data: st.DataObject, slow: bool) -> None:
        forward, _ = data.draw(st.sampled_from(self.requests))
        forward.pause() if slow else forward.resume()

    @rule(seconds=st.sampled_from((0.0, 0.2, 4.0, 11.0)))
    def wait(self, seconds: float) -> None:
        self.it.time.advance(seconds)

    @invariant()
    def what_is_held_is_under_way(self) -> None:
        live = len(self.it.forwarder.live)
        assert self.it.held("d") == live
        assert self.it.held("p") <= live
        assert self.it.held_tokens("p") == 10 * self.it.held("p")
        assert len(self.under_way) <= 2 * live

    @invariant()
    def nothing_is_left_over(self) -> None:
        if not self.it.forwarder.live:
            assert (self.it.held("p"), self.it.held("d")) == (0, 0)
            assert self.under_way == []
            assert all(client.ended or client.left for _, client in self.requests)


class Sequential(Machine):
    kind = EngineKind.VLLM


class Strict(Machine):
    terms = Terms(prefill_s=3.0, decode_s=3.0, whole_s=8.0, awaits_prefill_s=2.0, repeats=False)


Machine.TestCase.settings = Sequential.TestCase.settings = Strict.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestConcurrent = Machine.TestCase
TestSequential = Sequential.TestCase
TestStrict = Strict.TestCase
