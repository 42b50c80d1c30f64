"""The native transport against an engine that says what the test wants, frame by frame."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

import msgpack
import pytest
import uvloop
import zmq

from broker import wire
from broker.config import Config, Timeouts
from broker.errors import BadRequest, ConnectFailed, EngineSaturated, UpstreamBroken
from broker.types import EngineKind, Instance
from frontend.upstream.base import Headers, UpstreamRequest
from frontend.upstream.zmq import BATCH, ZmqUpstream
from tests.support.fake_engines import CHUNK, DATA_HELLO, DATA_WELCOME, DONE, ERROR, PONG, REQUEST, ZmqAsked, ZmqEngine
from tests.support.sinks import RecordingSink
from tests.support.waiting import PATIENCE_S, eventually

Scene = Callable[[ZmqUpstream, ZmqEngine], Awaitable[None]]


def play(scene: Scene, *, connect_secs: float = 5.0, batch: int = BATCH) -> None:
    async def run() -> None:
        with zmq.Context() as context:
            engine = ZmqEngine(context)
            upstream = ZmqUpstream(Config(timeouts=Timeouts(connect_secs=connect_secs)), batch=batch)
            try:
                await scene(upstream, engine)
                await eventually(lambda: not upstream._calls, upstream)
            finally:
                upstream.close()
                engine.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def post(
    upstream: ZmqUpstream,
    instance: Instance,
    *,
    stream: bool = True,
    headers: Headers | None = None,
    body: bytes = b"{}",
) -> RecordingSink:
    sink = RecordingSink()
    request = UpstreamRequest(path="/p", headers=headers or [], body=body, stream=stream, transfer=b"\0t")
    sink.call = upstream.open(instance, request, sink)
    return sink


async def ended(sink: RecordingSink) -> RecordingSink:
    await asyncio.wait_for(sink.ended.wait(), PATIENCE_S)
    sink.check()
    return sink


def test_hello_comes_first_and_once_and_the_request_carries_everything() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        upstream.resync(7)
        headers = [(b"x-a", b"1"), (b"x-a", b"2"), (b"host", b"h"), (b"x-\xe4", b"\xe4")]
        sinks = [post(upstream, engine.instance, headers=headers) for _ in range(2)]
        for _ in sinks:
            (await engine.asked()).done()
        for sink in sinks:
            await ended(sink)
        assert engine.heard == [
            [DATA_HELLO, wire.PROTOCOL, 7],
            [REQUEST, engine.incarnation, 1, "/p", True, {"x-a": "1, 2", "x-ä": "ä"}, b"\0t"],
            [REQUEST, engine.incarnation, 2, "/p", True, {"x-a": "1, 2", "x-ä": "ä"}, b"\0t"],
        ]

    play(scene)


def test_see_connects_before_the_first_request_and_resync_says_hello_again() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        upstream.see([engine.instance, Instance(url="http://127.0.0.1:1")])
        await eventually(lambda: len(engine.heard) == 1, engine.heard)
        upstream.resync(9)
        await eventually(lambda: engine.heard[1:] == [[DATA_HELLO, wire.PROTOCOL, 9]], engine.heard)

    play(scene)


def test_deltas_of_one_batch_become_one_write_per_client() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sinks = [post(upstream, engine.instance) for _ in range(3)]
        asked = [await engine.asked() for _ in sinks]
        step = [one.delta(CHUNK, b"%d" % n) for n in range(4) for one in asked]
        engine.step(asked[0].route, step + [one.delta(DONE, b".") for one in asked])
        for sink in sinks:
            await ended(sink)
            assert (sink.events, sink.body) == (["start", "write", "finish"], b"0123.")

    play(scene)


def test_ten_thousand_messages_at_a_batch_limit_of_one_do_not_stall() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        for n in range(10_000):
            asked.chunk(b"%d," % n)
        asked.done()
        await ended(sink)
        assert sink.body == b"".join(b"%d," % n for n in range(10_000))

    play(scene, batch=1)


# -- answers that cannot be trusted ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delta", "what"),
    [
        (lambda n: [n, 2, CHUNK, b"x"], "lost"),
        (lambda n: [n, 0, CHUNK, b"x"], "lost"),
        (lambda n: [n, "1", CHUNK, b"x"], "lost"),
        (lambda n: [n, 1, CHUNK, "text"], "malformed"),
        (lambda n: [n, 1, CHUNK, None], "malformed"),
        (lambda n: [n, 1, 9, b"x"], "unknown kind"),
        (lambda n: [n, 1, [], b"x"], "unknown kind"),
    ],
    ids=["gap", "repeated", "sequence is text", "data are text", "no data", "unknown kind", "kind is a list"],
)
def test_unusable_delta_ends_its_call_alone_and_the_engine_is_told(
    delta: Callable[[int], list[object]], what: str
) -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        broken, fine = post(upstream, engine.instance), post(upstream, engine.instance)
        first, second = await engine.asked(), await engine.asked()
        engine.step(first.route, [first.delta(CHUNK, b"a"), delta(first.id), second.delta(DONE, b"b")])
        await ended(broken)
        assert broken.body == b"a"
        assert isinstance(broken.error, UpstreamBroken)
        assert what in broken.error.message
        await asyncio.wait_for(first.aborted.wait(), PATIENCE_S)
        assert (await ended(fine)).body == b"b"

    play(scene)


def test_malformed_frames_are_counted_logged_once_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        route, mine = asked.route, engine.incarnation
        frames = [
            b"",
            b"\xc1",
            b"\x92\x01",
            b"\x90",
            b"\x80",
            msgpack.packb([82]),
            msgpack.packb([82, mine]),
            msgpack.packb([82, mine, 5]),
            msgpack.packb([82, "x", []]),
            msgpack.packb([82, mine, [5, [], [1, 2, 3], ["1", 0, 0, b""], [[], 0, 0, b""]]]),
            msgpack.packb([99, mine]),
            msgpack.packb([wire.STEP_TAG - 1]),
            msgpack.packb([DATA_WELCOME, "1", mine]),
            b"\x91" * 100_000,
        ]
        for frame in frames:
            engine.send(route, frame)
        engine.send(route, msgpack.packb([PONG, mine]), b"a frame too many")
        asked.done(b"fine")
        assert (await ended(sink)).body == b"fine"
        assert upstream.dropped.malformed == len(frames) + 1

    with caplog.at_level(logging.WARNING):
        play(scene)
    assert len([r for r in caplog.records if "dropped a frame" in r.message]) == 1


def test_deltas_of_unknown_calls_and_later_fields_are_ignored() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        engine.step(
            asked.route, [[999, 0, DONE, b"x"], [-1, 0, CHUNK, b"x"], asked.delta(CHUNK, b"a", 0, {"later": 1})]
        )
        engine.send(asked.route, msgpack.packb([82, engine.incarnation, [asked.delta(DONE, b"b")], "later"]))
        assert (await ended(sink)).body == b"ab"
        assert upstream.dropped.malformed == 0

    play(scene)


def test_answers_of_another_incarnation_are_dropped_and_counted() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        engine.step(asked.route, [[asked.id, 0, DONE, b"old"]], incarnation=b"o" * 16)
        asked.done(b"new")
        assert (await ended(sink)).body == b"new"
        assert upstream.dropped.foreign_incarnation == 1

    play(scene)


def test_one_engine_cannot_answer_for_another() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        with zmq.Context() as context:
            other = ZmqEngine(context)
            try:
                mine, others = post(upstream, engine.instance), post(upstream, other.instance)
                asked, foreign = await engine.asked(), await other.asked()
                other.step(foreign.route, [[asked.id, 0, DONE, b"forged"], foreign.delta(DONE, b"own")])
                assert (await ended(others)).body == b"own"
                asked.done(b"true")
                assert (await ended(mine)).body == b"true"
            finally:
                other.close()

    play(scene)


@pytest.mark.parametrize("status", [200, 302, 600, "500", None, True])
def test_error_with_an_impossible_status_is_502(status: object) -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        engine.step(asked.route, [asked.delta(ERROR, b"{}", status)])
        assert (await ended(sink)).status == 502

    play(scene)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b'{"error": "oom"}', "oom"), (b'{"error":{"message":"oom","code":null}}', "oom"), (b"<oom>", "<oom>")],
)
def test_error_after_the_first_bytes_is_upstream_broken_even_in_the_same_step(data: bytes, words: str) -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        engine.step(asked.route, [asked.delta(CHUNK, b"a"), asked.delta(ERROR, data, 500)])
        await ended(sink)
        assert (sink.status, sink.body) == (200, b"a")
        assert isinstance(sink.error, UpstreamBroken)
        assert sink.error.message == f"the engine ended its answer with an error: {words}"

    play(scene)


# -- lives -------------------------------------------------------------------------------------------------


def test_engine_that_does_not_welcome_is_connect_failed() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        engine.mute = True
        assert isinstance((await ended(post(upstream, engine.instance))).error, ConnectFailed)
        engine.mute = False
        sink = post(upstream, engine.instance)
        await engine.asked()
        (await engine.asked()).done(b"back")
        assert (await ended(sink)).body == b"back"

    play(scene, connect_secs=1.0)


def test_engine_of_another_protocol_is_connect_failed() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        engine.mute = True
        engine.on_request = lambda asked: engine.send(asked.route, msgpack.packb([DATA_WELCOME, 2, engine.incarnation]))
        sink = await ended(post(upstream, engine.instance))
        assert isinstance(sink.error, ConnectFailed)
        assert "protocol 2" in sink.error.message

    play(scene)


def test_engine_of_another_incarnation_at_the_endpoint_is_connect_failed() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        before = Instance(url=engine.endpoint, engine=EngineKind.NATIVE, incarnation=b"b" * 16)
        assert isinstance((await ended(post(upstream, before))).error, ConnectFailed)
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        while asked.incarnation != engine.incarnation:
            asked = await engine.asked()
        asked.done(b"now")
        assert (await ended(sink)).body == b"now"

    play(scene)


def test_silent_engine_is_dead_and_may_come_back() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        asked.chunk(b"a")
        await eventually(lambda: sink.body == b"a", sink)
        engine.mute = True
        assert isinstance((await ended(sink)).error, UpstreamBroken)
        engine.mute = False
        asked.done(b"too late")
        again = post(upstream, engine.instance)
        (await engine.asked()).done(b"b")
        assert (await ended(again)).body == b"b"

    play(scene)


def test_engine_that_says_its_last_words_and_dies_is_heard_out() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sinks = [post(upstream, engine.instance) for _ in range(20)]
        asked = [await engine.asked() for _ in sinks]
        engine._socket.setsockopt(zmq.LINGER, 5000)
        for one in asked:
            one.done(b"last")
        engine.die()
        for sink in sinks:
            assert (await ended(sink)).body == b"last"

    play(scene, batch=1)


def test_forgotten_engine_ends_its_answers_and_then_its_connection() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        upstream.forget(engine.incarnation)
        asked.done(b"x")
        assert (await ended(sink)).body == b"x"
        await eventually(lambda: not upstream._peers, upstream)

    play(scene)


def test_request_without_an_incarnation_is_connect_failed() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        nameless = Instance(url=engine.endpoint, engine=EngineKind.NATIVE)
        assert isinstance((await ended(post(upstream, nameless))).error, ConnectFailed)

    play(scene)


def test_oversized_headers_are_refused() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sink = post(upstream, engine.instance, headers=[(b"x", b"a" * wire.MAX_CONTROL_BYTES)])
        assert isinstance((await ended(sink)).error, BadRequest)

    play(scene)


def test_engine_at_its_mark_is_saturated_and_nothing_is_lost() -> None:
    """Whatever was accepted is answered; whatever was not, said so."""

    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        engine.on_request = ZmqAsked.done
        sinks = [post(upstream, engine.instance, body=b"x" * 1_000_000) for _ in range(40)]
        for sink in sinks:
            await ended(sink)
        refused = [s for s in sinks if s.error is not None]
        assert refused
        assert all(isinstance(s.error, EngineSaturated) for s in refused)
        assert len(engine.requests) == len(sinks) - len(refused)

    play(scene)


def test_aborts_of_one_turn_are_one_message() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sinks = [post(upstream, engine.instance) for _ in range(5)]
        asked = [await engine.asked() for _ in sinks]
        for sink in sinks:
            sink.leave()
        for one in asked:
            await asyncio.wait_for(one.aborted.wait(), PATIENCE_S)
        assert [m for m in engine.heard if m[0] == 67] == [[67, [1, 2, 3, 4, 5]]]

    play(scene)


def test_abort_that_an_engine_does_not_take_is_said_as_soon_as_it_does() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        peer = upstream._peers.at(engine.instance)
        peer.pause_writing()
        sink.leave()
        other = await ended(post(upstream, engine.instance))
        assert isinstance(other.error, EngineSaturated)
        assert not asked.aborted.is_set()
        peer.resume_writing()
        await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)

    play(scene)


def test_bug_in_one_sink_does_not_keep_the_others_back() -> None:
    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        complaints: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))

        def bug() -> None:
            raise RuntimeError("a bug")

        buggy, fine = post(upstream, engine.instance), post(upstream, engine.instance)
        buggy.on_write = bug
        first, second = await engine.asked(), await engine.asked()
        engine.step(first.route, [first.delta(CHUNK, b"a"), second.delta(DONE, b"b")])
        assert (await ended(fine)).body == b"b"
        assert len(complaints) == 1
        buggy.leave()

    play(scene)


# -- noise -------------------------------------------------------------------------------------------------


def test_mutated_frames_never_crash_nor_stop_the_transport() -> None:
    draw = random.Random(20260102)

    async def scene(upstream: ZmqUpstream, engine: ZmqEngine) -> None:
        for _ in range(40):
            sinks = [post(upstream, engine.instance) for _ in range(5)]
            asked = [await engine.asked() for _ in sinks]
            for _ in range(50):
                step = [one.delta(draw.choice([CHUNK, CHUNK, DONE, ERROR]), b"data", 500) for one in asked]
                frame = bytearray(msgpack.packb([82, engine.incarnation, step]))
                for _ in range(draw.randint(1, 5)):
                    at = draw.randrange(len(frame))
                    match draw.randrange(3):
                        case 0:
                            frame[at] = draw.randrange(256)
                        case 1:
                            del frame[at : at + draw.randint(1, 4)]
                        case _:
                            frame[at:at] = draw.randbytes(draw.randint(1, 4))
                    frame = frame or bytearray(b"\0")
                engine.send(asked[0].route, bytes(frame))
            for sink in sinks:
                sink.leave()
                sink.check()
        sink = post(upstream, engine.instance)
        (await engine.asked()).done(b"alive")
        assert (await ended(sink)).body == b"alive"

    play(scene)
