"""Every transport keeps the contract of frontend/upstream/base.py, on both event loops, and with sinks that lend their
streams to the short way."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import uvloop
import zmq

from broker.config import Config, Timeouts, Upstream
from broker.errors import ClientTooSlow, ConnectFailed, PenstockError, UpstreamBroken, UpstreamError
from broker.types import EngineKind, Instance
from frontend import conduit
from frontend.upstream.base import UpstreamRequest
from frontend.upstream.http import HttpUpstream
from frontend.upstream.zmq import ZmqUpstream
from tests.support.fake_engines import FakeEngine, HttpEngine, ZmqEngine
from tests.support.sinks import FlowingSink, RecordingSink
from tests.support.waiting import PATIENCE_S, eventually

BODY = b'{"model": "m", "stream": true}'


@dataclass
class Stage:
    """One transport, its engines, and the sinks of the test."""

    transport: str
    upstream: HttpUpstream | ZmqUpstream
    context: zmq.Context[zmq.Socket[bytes]]
    sink: type[RecordingSink] = RecordingSink
    engines: list[FakeEngine] = field(default_factory=list)
    sinks: list[RecordingSink] = field(default_factory=list)

    async def engine(self) -> FakeEngine:
        engine: FakeEngine = await (HttpEngine.open() if self.transport == "http" else ZmqEngine.open(self.context))
        self.engines.append(engine)
        return engine

    def open(self, instance: Instance, body: bytes = BODY, *, stream: bool = True) -> RecordingSink:
        sink = self.sink()
        self.sinks.append(sink)
        request = UpstreamRequest(
            path="/v1/chat/completions", headers=[(b"x-request-id", b"r1")], body=body, stream=stream
        )
        sink.call = self.upstream.open(instance, request, sink)
        return sink

    def nowhere(self) -> Instance:
        """Where nobody listens."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        if self.transport == "http":
            return Instance(url=f"http://127.0.0.1:{port}")
        return Instance(url=f"tcp://127.0.0.1:{port}", engine=EngineKind.NATIVE, incarnation=b"n" * 16)

    def left_over(self) -> list[object]:
        """What a transport without open calls may not hold."""
        if isinstance(self.upstream, ZmqUpstream):
            return [*self.upstream._calls.values(), *self.upstream._ready, *self.upstream._peers.aborting]
        pools = [*self.upstream._pools.values(), *self.upstream._retired]
        busy = [c for p in pools for c in p._connections if c not in p._idle]
        return [*busy, *(w for p in pools for w in p._waiting)]


Scene = Callable[[Stage], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture(params=["http", "zmq"])
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["asyncio", "uvloop", "asyncio, flowing", "uvloop, flowing"])
def play(request: pytest.FixtureRequest, transport: str) -> Play:
    """Runs a scene on a stage of its own; afterwards no rule was broken and nothing is left over."""
    loop, _, flowing = request.param.partition(", ")
    if flowing and conduit.compiled is None:
        pytest.skip("the short way was not compiled here")

    async def run(scene: Scene, connect_secs: float, stream_buffer_bytes: int) -> None:
        config = Config(
            timeouts=Timeouts(connect_secs=connect_secs), upstream=Upstream(stream_buffer_bytes=stream_buffer_bytes)
        )
        with zmq.Context() as context:
            upstream = HttpUpstream(config) if transport == "http" else ZmqUpstream(config)
            stage = Stage(transport, upstream, context, FlowingSink if flowing else RecordingSink)
            try:
                await scene(stage)
                await eventually(lambda: not stage.left_over(), stage.left_over)
            finally:
                upstream.close()
                for engine in stage.engines:
                    engine.close()
            for sink in stage.sinks:
                sink.check()

    def play(scene: Scene, *, connect_secs: float = 5.0, stream_buffer_bytes: int = 4 * 1024 * 1024) -> None:
        factory = uvloop.new_event_loop if loop == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(run(scene, connect_secs, stream_buffer_bytes))

    return play


async def ended(sink: RecordingSink) -> None:
    await asyncio.wait_for(sink.ended.wait(), PATIENCE_S)


def heard(sink: RecordingSink, body: bytes) -> Awaitable[bool | None]:
    return eventually(lambda: sink.body == body, sink)


def test_unstreamed_answer_comes_whole_with_its_length(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance, stream=False)
        asked = await engine.asked()
        assert (asked.path, asked.body) == ("/v1/chat/completions", BODY)
        asked.done(b'{"id": 1}')
        await ended(sink)
        assert sink.events == ["start", "write", "finish"]
        assert (sink.status, sink.body) == (200, b'{"id": 1}')
        assert sink.header(b"content-type") == b"application/json"
        assert sink.header(b"content-length") == b"9"

    play(scene)


def test_stream_passes_through_unchanged(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        asked = await engine.asked()
        pieces = [b'data: {"n": %d}\n\n' % n for n in range(50)]
        for number in range(3):
            asked.chunk(pieces[number])
            await heard(sink, b"".join(pieces[: number + 1]))
        for piece in pieces[3:]:
            asked.chunk(piece)
        asked.done(b"data: [DONE]\n\n")
        await ended(sink)
        assert sink.body == b"".join(pieces) + b"data: [DONE]\n\n"
        assert not isinstance(sink, FlowingSink) or sink.lent
        assert sink.header(b"content-type") == b"text/event-stream; charset=utf-8"
        assert sink.events[-1] == "finish"

    play(scene)


def test_stream_may_end_without_last_bytes(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        asked = await engine.asked()
        asked.chunk(b"a")
        asked.done()
        await ended(sink)
        assert (sink.body, sink.events[-1]) == (b"a", "finish")

    play(scene)


def test_empty_answer_is_an_answer(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance, stream=False)
        (await engine.asked()).done()
        await ended(sink)
        assert sink.events == ["start", "finish"]
        assert sink.header(b"content-length") == b"0"

    play(scene)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_status_of_the_engine_passes_through(play: Play, status: int, stream: bool) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance, stream=stream)
        (await engine.asked()).refuse(status, b'{"error": {}}')
        await ended(sink)
        assert sink.events == ["start", "write", "finish"]
        assert (sink.status, sink.body) == (status, b'{"error": {}}')
        assert sink.header(b"content-type") == b"application/json"

    play(scene)


def test_a_large_body_arrives_and_returns_unchanged(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        body = bytes(range(256)) * 16384  # 4 MiB: beyond every socket buffer
        sink = stage.open(engine.instance, body, stream=False)
        asked = await engine.asked()
        assert asked.body == body
        asked.done(body)
        await ended(sink)
        assert sink.body == body

    play(scene)


def test_one_after_the_other_and_side_by_side(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        for n in range(5):
            sink = stage.open(engine.instance, b"%d" % n)
            asked = await engine.asked()
            asked.done(asked.body)
            await ended(sink)
            assert sink.body == b"%d" % n
        sinks = [stage.open(engine.instance, b"%d" % n) for n in range(20)]
        asked_all = [await engine.asked() for _ in sinks]
        for asked in asked_all:
            asked.chunk(asked.body + b",")
        for asked in reversed(asked_all):
            asked.done(asked.body)
        for n, sink in enumerate(sinks):
            await ended(sink)
            assert sink.body == b"%d,%d" % (n, n)

    play(scene)


def test_several_engines_side_by_side(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engines = [await stage.engine() for _ in range(3)]
        sinks = [stage.open(engine.instance, b"%d" % n) for n, engine in enumerate(engines)]
        for n, engine in enumerate(engines):
            asked = await engine.asked()
            assert asked.body == b"%d" % n
            asked.done(b"from %d" % n)
        for n, sink in enumerate(sinks):
            await ended(sink)
            assert sink.body == b"from %d" % n

    play(scene)


# -- failures ----------------------------------------------------------------------------------------------


def test_nobody_listening_is_connect_failed(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        sink = stage.open(stage.nowhere())
        assert sink.events == []
        await ended(sink)
        assert sink.events == ["fail"]
        assert isinstance(sink.error, ConnectFailed)

    play(scene, connect_secs=5.0)


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "tcp://", "http://", "http://127.0.0.1:99999", "nonsense", ""])
def test_an_unusable_url_is_connect_failed(play: Play, url: str) -> None:
    async def scene(stage: Stage) -> None:
        sink = stage.open(Instance(url=url, engine=EngineKind.NATIVE, incarnation=b"n" * 16))
        await ended(sink)
        assert sink.events == ["fail"]
        assert isinstance(sink.error, ConnectFailed)

    play(scene)


def test_engine_death_before_the_first_byte_is_upstream_broken(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        await engine.asked()
        engine.die()
        await ended(sink)
        assert sink.events == ["fail"]
        assert isinstance(sink.error, UpstreamBroken)
        assert sink.error.retryable

    play(scene)


def test_engine_death_in_mid_stream_is_upstream_broken_after_its_last_bytes(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        (await engine.asked()).chunk(b"half")
        await heard(sink, b"half")
        engine.die()
        await ended(sink)
        assert sink.events == ["start", "write", "fail"]
        assert isinstance(sink.error, UpstreamBroken)

    play(scene)


def test_engine_death_ends_every_call_of_it_and_no_other(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        dying, living = await stage.engine(), await stage.engine()
        sinks = [stage.open(dying.instance) for _ in range(10)]
        other = stage.open(living.instance)
        for _ in sinks:
            await dying.asked()
        asked = await living.asked()
        dying.die()
        for sink in sinks:
            await ended(sink)
            assert isinstance(sink.error, UpstreamError)
        asked.done(b"fine")
        await ended(other)
        assert other.body == b"fine"

    play(scene)


def test_a_dead_engine_refuses_the_next_request_and_serves_again_when_it_is_back(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        (await engine.asked()).done(b"one")
        await ended(sink)
        engine.die()
        sink = stage.open(engine.instance)
        await ended(sink)
        assert isinstance(sink.error, UpstreamError)
        back = await stage.engine()
        sink = stage.open(back.instance)
        (await back.asked()).done(b"two")
        await ended(sink)
        assert sink.body == b"two"

    play(scene)


# -- cancel at every stage ---------------------------------------------------------------------------------


def test_cancel_right_after_open_is_silent(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        for instance in (engine.instance, stage.nowhere()):
            stage.open(instance).leave()
        other = stage.open(engine.instance, b"other")
        asked = await engine.asked()
        while asked.body != b"other":  # the cancelled one may have reached the engine, which is told
            await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)
            asked = await engine.asked()
        asked.done(b"ok")
        await ended(other)
        assert other.body == b"ok"

    play(scene)


def test_cancel_while_the_engine_works_reaches_it_at_once(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        asked = await engine.asked()
        sink.leave()
        await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)

    play(scene)


def test_cancel_in_mid_body_reaches_the_engine_and_later_bytes_reach_nobody(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        asked = await engine.asked()
        asked.chunk(b"a")
        await heard(sink, b"a")
        sink.leave()
        await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)
        asked.chunk(b"b")
        asked.done(b"c")
        other = stage.open(engine.instance)
        (await engine.asked()).done(b"other")
        await ended(other)
        assert (sink.body, other.body) == (b"a", b"other")

    play(scene)


@pytest.mark.parametrize("where", ["start", "write"])
def test_cancel_from_within_the_sink(play: Play, where: str) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        setattr(sink, f"on_{where}", sink.leave)
        asked = await engine.asked()
        asked.chunk(b"a")
        asked.chunk(b"b")
        await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)
        assert sink.events == ["start"] if where == "start" else ["start", "write"]

    play(scene)


def test_cancel_after_the_end_and_twice_is_harmless(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        (await engine.asked()).done(b"x")
        await ended(sink)
        other = stage.open(engine.instance)  # over HTTP it has the first one's connection
        asked = await engine.asked()
        for _ in range(2):
            sink.leave()
        asked.done(b"y")
        await ended(other)
        assert other.body == b"y"
        for _ in range(2):
            other.leave()

    play(scene)


def test_a_sink_may_open_the_next_call_when_it_ends(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        later: list[RecordingSink] = []
        sink = stage.open(engine.instance)
        sink.on_write = lambda: later.append(stage.open(engine.instance, b"next"))
        (await engine.asked()).done(b"x")
        (await engine.asked()).done(b"y")
        await ended(later[0])
        assert later[0].body == b"y"

    play(scene)


# -- back-pressure -----------------------------------------------------------------------------------------


def test_paused_sink_hears_nothing_and_then_everything(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        asked = await engine.asked()
        asked.chunk(b"a")
        await heard(sink, b"a")
        sink.pause()
        asked.chunk(b"b")
        asked.done(b"c")
        witness = stage.open(engine.instance)  # what was sent to the paused one has arrived before this
        (await engine.asked()).done()
        await ended(witness)
        assert sink.body == b"a"
        sink.resume()
        await ended(sink)
        assert (sink.body, sink.events[-1]) == (b"abc", "finish")

    play(scene)


@pytest.mark.parametrize("where", ["start", "write"])
def test_pause_from_within_the_sink(play: Play, where: str) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        setattr(sink, f"on_{where}", sink.pause)
        asked = await engine.asked()
        asked.chunk(b"a")
        await eventually(lambda: sink.events, sink)
        sink.on_start = sink.on_write = lambda: None
        asked.chunk(b"b")
        asked.done()
        sink.resume()
        await ended(sink)
        assert sink.body == b"ab"

    play(scene)


def test_pause_before_the_answer_and_cancel_while_paused(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        sink.pause()
        asked = await engine.asked()
        asked.chunk(b"a")
        witness = stage.open(engine.instance)
        (await engine.asked()).done()
        await ended(witness)
        assert sink.events == []
        sink.leave()
        await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)

    play(scene)


def test_a_slow_client_is_bounded(play: Play, transport: str) -> None:
    """HTTP: the engine is held back. Native: the call ends, and the engine is told."""
    piece = b"x" * 65536

    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        sink = stage.open(engine.instance)
        asked = await engine.asked()
        asked.chunk(b"a")
        await heard(sink, b"a")
        sink.pause()
        for _ in range(400):  # 25 MiB: more than the kernel's buffers and the bound of 1 MiB
            asked.chunk(piece)
        if transport == "zmq":
            await ended(sink)
            assert isinstance(sink.error, ClientTooSlow)
            await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)
        else:
            asked.done()
            assert asked.transport.get_write_buffer_size() > 0  # type: ignore[attr-defined]  # HttpAsked
            sink.resume()
            await ended(sink)
            assert len(sink.body) == 1 + 400 * len(piece)

    play(scene, stream_buffer_bytes=1024 * 1024)


# -- closing -----------------------------------------------------------------------------------------------


def test_close_fails_what_is_open_and_whatever_comes_later(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = await stage.engine()
        working = stage.open(engine.instance)
        await engine.asked()
        paused = stage.open(engine.instance)
        (await engine.asked()).chunk(b"x")
        await heard(paused, b"x")
        paused.pause()
        connecting = stage.open((await stage.engine()).instance)
        stage.upstream.close()
        for sink in (working, paused, connecting):
            assert isinstance(sink.error, PenstockError)
        late = stage.open(engine.instance)
        await ended(late)
        assert isinstance(late.error, ConnectFailed)

    play(scene)
