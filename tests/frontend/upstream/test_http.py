"""The HTTP transport on real sockets: connections kept, counted, waited for and found stale; requests as bytes."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from broker.config import Config, Timeouts, Upstream
from broker.errors import BadRequest, ConnectFailed, EngineSaturated, UpstreamBroken
from broker.types import Instance
from frontend.upstream.base import UpstreamRequest
from frontend.upstream.http import HttpUpstream, request_head
from frontend.upstream.http_response import ResponseReader
from tests.support.fake_engines import HttpAsked, HttpEngine
from tests.support.sinks import RecordingSink
from tests.support.waiting import PATIENCE_S, eventually

DONE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def play(
    scene: Callable[[HttpUpstream, HttpEngine], Awaitable[None]],
    *,
    connections: int = 8,
    connect_secs: float = 5.0,
    idle_s: float = 60.0,
    host: str = "127.0.0.1",
) -> None:
    async def run() -> None:
        config = Config(timeouts=Timeouts(connect_secs=connect_secs), upstream=Upstream(connections=connections))
        engine = await HttpEngine.open(host)
        upstream = HttpUpstream(config, idle_s=idle_s)
        try:
            await scene(upstream, engine)
        finally:
            upstream.close()
            engine.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def post(upstream: HttpUpstream, instance: Instance, body: bytes = b"{}", method: str = "POST") -> RecordingSink:
    sink = RecordingSink()
    sink.call = upstream.open(instance, UpstreamRequest(path="/p", headers=[], body=body, method=method), sink)
    return sink


async def ended(sink: RecordingSink) -> RecordingSink:
    await asyncio.wait_for(sink.ended.wait(), PATIENCE_S)
    sink.check()
    return sink


def answer(asked: HttpAsked) -> None:
    asked.raw(DONE)


# -- connections -------------------------------------------------------------------------------------------


def test_connection_is_kept_for_the_next_request() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = answer
        for _ in range(5):
            assert (await ended(post(upstream, engine.instance))).body == b"ok"
        assert [c.count for c in engine.connections] == [5]

    play(scene)


def test_connection_used_last_is_used_first() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        sinks = [post(upstream, engine.instance) for _ in range(3)]
        asked = [await engine.asked() for _ in sinks]
        for one in asked:
            one.raw(DONE)
            await eventually(lambda: any(s.ended.is_set() for s in sinks), sinks)
        for sink in sinks:
            await ended(sink)
        for _ in range(3):
            sink = post(upstream, engine.instance)
            again = await engine.asked()
            again.raw(DONE)
            await ended(sink)
        assert sorted(c.count for c in engine.connections) == [1, 1, 4]

    play(scene)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        DONE + b"x",
        DONE + DONE,
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    ],
    ids=["close", "garbage", "second response", "HTTP/1.0"],
)
def test_connection_in_doubt_is_not_used_again(raw: bytes) -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = lambda asked: asked.raw(raw)
        for _ in range(2):
            assert (await ended(post(upstream, engine.instance))).body == b"ok"
        assert [c.count for c in engine.connections] == [1, 1]

    play(scene)


def test_idle_connection_that_speaks_is_closed() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = answer
        await ended(post(upstream, engine.instance))
        engine.connections[0].raw(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        await asyncio.wait_for(engine.connections[0].aborted.wait(), PATIENCE_S)
        sink = await ended(post(upstream, engine.instance))
        assert (sink.status, [c.count for c in engine.connections]) == (200, [1, 1])

    play(scene)


def test_early_answer_to_a_body_still_under_way_ends_the_connection() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        def refuse(asked: HttpAsked) -> None:
            asked.transport.pause_reading()
            asked.raw(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")

        engine.on_connect = refuse
        sink = await ended(post(upstream, engine.instance, b"x" * (32 * 1024 * 1024)))
        assert (sink.status, sink.body) == (413, b"no")
        assert upstream._pools[engine.instance.url].idle() is None

    play(scene)


def test_idle_connections_are_closed_after_a_while() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = answer
        await asyncio.gather(*(ended(post(upstream, engine.instance)) for _ in range(3)))
        for connection in engine.connections:
            await asyncio.wait_for(connection.aborted.wait(), PATIENCE_S)
        await eventually(lambda: upstream._pools[engine.instance.url].is_empty, upstream)

    play(scene, idle_s=0.05)


def test_forget_closes_idle_connections_and_lets_answers_end() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        idle, busy = post(upstream, engine.instance), post(upstream, engine.instance)
        first, second = await engine.asked(), await engine.asked()
        first.raw(DONE)
        await eventually(lambda: idle.ended.is_set() or busy.ended.is_set(), (idle, busy))
        upstream.forget(engine.instance.url)
        await asyncio.wait_for(first.aborted.wait(), PATIENCE_S)
        second.raw(DONE)
        await ended(idle)
        await ended(busy)
        await asyncio.wait_for(second.aborted.wait(), PATIENCE_S)
        assert (idle.body, busy.body) == (b"ok", b"ok")

    play(scene)


def test_close_ends_calls_of_forgotten_instances_too() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        sink = post(upstream, engine.instance)
        await engine.asked()
        upstream.forget(engine.instance.url)
        upstream.close()
        assert isinstance(sink.error, UpstreamBroken)

    play(scene)


def test_small_requests_are_not_held_back_by_nagle() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = answer
        await ended(post(upstream, engine.instance))
        connection = upstream._pools[engine.instance.url].idle()
        assert connection is not None
        assert connection._transport is not None
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    play(scene)


def test_ipv6() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        sink = post(upstream, engine.instance)
        asked = await engine.asked()
        assert f"Host: [::1]:{engine.port}\r\n".encode() in asked.head + b"\r\n"
        asked.raw(DONE)
        await ended(sink)

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    play(scene, host="::1")


# -- the limit ---------------------------------------------------------------------------------------------


def test_connections_are_bounded_and_waiting_calls_are_served_in_order() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        sinks = [post(upstream, engine.instance, b"%d" % n) for n in range(4)]
        served = []
        for _ in sinks:
            asked = await engine.asked()
            served.append(asked.body)
            asked.raw(DONE)
        for sink in sinks:
            await ended(sink)
        assert len(engine.connections) == 2
        assert sorted(served[:2]) == [b"0", b"1"]
        assert served[2:] == [b"2", b"3"]

    play(scene, connections=2)


def test_waiting_is_bounded_in_number_and_in_time() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        busy, waiting, refused = (post(upstream, engine.instance) for _ in range(3))
        assert isinstance((await ended(refused)).error, EngineSaturated)
        assert isinstance((await ended(waiting)).error, EngineSaturated)
        (await engine.asked()).raw(DONE)
        assert (await ended(busy)).body == b"ok"

    play(scene, connections=1, connect_secs=1.0)


def test_aborted_exchange_leaves_no_reader_to_the_collector() -> None:
    """It comes once in 20,000 objects: with each abort leaving a dozen, a frontend would hold megabytes of them."""

    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        def readers() -> int:
            return sum(isinstance(o, ResponseReader) for o in gc.get_objects())

        before = readers()
        for _ in range(3):
            sink = post(upstream, engine.instance)
            asked = await engine.asked()
            asked.chunk(b"data: x\n\n")
            await eventually(lambda sink=sink: sink.body, "a first byte")
            sink.leave()
            await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)
        del sink
        await eventually(lambda: readers() == before, readers)

    gc.collect()
    gc.disable()
    try:
        play(scene)
    finally:
        gc.enable()


def test_cancelled_waiting_call_leaves_its_place() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        busy, left = post(upstream, engine.instance, b"busy"), post(upstream, engine.instance, b"left")
        left.leave()
        after = post(upstream, engine.instance, b"after")
        (await engine.asked()).raw(DONE)
        asked = await engine.asked()
        assert asked.body == b"after"
        asked.raw(DONE)
        await ended(busy)
        await ended(after)
        left.check()

    play(scene, connections=1)


def test_place_of_a_broken_connection_goes_to_the_next() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        first, second = post(upstream, engine.instance), post(upstream, engine.instance)
        (await engine.asked()).transport.abort()
        assert isinstance((await ended(first)).error, UpstreamBroken)
        (await engine.asked()).raw(DONE)
        assert (await ended(second)).body == b"ok"

    play(scene, connections=1)


def test_connect_timeout() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        with socket.socket() as full, socket.socket() as one, socket.socket() as two:
            # Accepts nobody and has room for one or two; Linux then ignores whoever knocks.
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            for filler in (one, two):
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            sink = await ended(post(upstream, Instance(url=f"http://127.0.0.1:{full.getsockname()[1]}")))
            assert isinstance(sink.error, ConnectFailed)
        assert all(pool.is_empty for pool in upstream._pools.values())

    play(scene, connect_secs=1.0)


# -- stale connections -------------------------------------------------------------------------------------


def close_on(which: int) -> Callable[[HttpAsked], None]:
    """Answers, but closes instead at the request of that number on each connection."""

    def script(asked: HttpAsked) -> None:
        if asked.count == which:
            asked.transport.abort()
        else:
            asked.raw(DONE)

    return script


def test_stale_connection_is_replaced_unseen() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = close_on(2)
        await ended(post(upstream, engine.instance))
        assert (await ended(post(upstream, engine.instance))).events == ["start", "write", "finish"]
        assert len(engine.connections) == 2

    play(scene)


def test_second_try_takes_a_fresh_connection_even_if_others_are_idle() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = close_on(2)
        await asyncio.gather(*(ended(post(upstream, engine.instance)) for _ in range(3)))
        assert (await ended(post(upstream, engine.instance))).body == b"ok"
        assert sorted(c.count for c in engine.connections) == [1, 1, 1, 2]

    play(scene)


def test_fresh_connection_that_closes_is_broken_and_not_tried_again() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = close_on(1)
        assert isinstance((await ended(post(upstream, engine.instance))).error, UpstreamBroken)
        assert len(engine.connections) == 1

    play(scene)


def test_connection_that_closes_within_an_answer_is_broken_and_not_tried_again() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = answer
        await ended(post(upstream, engine.instance))

        def half(asked: HttpAsked) -> None:
            asked.raw(b"H")
            asked.transport.close()

        engine.on_request = half
        assert isinstance((await ended(post(upstream, engine.instance))).error, UpstreamBroken)
        assert len(engine.connections) == 1

    play(scene)


def test_engine_gone_behind_a_stale_connection_is_broken_since_the_request_may_have_been_read() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = lambda asked: answer(asked) if asked.count == 1 else engine.die()
        await ended(post(upstream, engine.instance))
        assert isinstance((await ended(post(upstream, engine.instance))).error, UpstreamBroken)

    play(scene)


# -- requests ----------------------------------------------------------------------------------------------


def head(path: str = "/v1/x?y=1", headers: list[tuple[bytes, bytes]] | None = None, method: str = "POST") -> bytes:
    return request_head(b"h:1", UpstreamRequest(path=path, headers=headers or [], body=b"{}", method=method))


def test_request_head() -> None:
    assert head(headers=[(b"accept", b"*/*"), (b"x-a", b"1"), (b"x-a", b"2")]) == (
        b"POST /v1/x?y=1 HTTP/1.1\r\nHost: h:1\r\naccept: */*\r\nx-a: 1\r\nx-a: 2\r\nContent-Length: 2\r\n\r\n"
    )


def test_headers_that_are_ours_to_say_are_said_once() -> None:
    ours = [b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"te", b"upgrade"]
    assert head(headers=[(name, b"1") for name in ours]) == head()


def test_request_without_a_body_has_no_length() -> None:
    request = UpstreamRequest(path="/", headers=[], body=b"", method="GET")
    assert request_head(b"h:1", request) == b"GET / HTTP/1.1\r\nHost: h:1\r\n\r\n"


@pytest.mark.parametrize("path", ["/a b", "/a\r\nX: 1", "/a\nb", "/ä", "/\0", "/a HTTP/1.1\r\n\r\nGET /b"])
def test_path_that_would_not_be_one_request_is_refused(path: str) -> None:
    with pytest.raises(BadRequest):
        head(path)


@pytest.mark.parametrize(
    "header", [(b"x", b"a\r\nb: c"), (b"x\r\ny", b"a"), (b"x", b"a\n"), (b"x", b"\0"), (b"x", b"\r")]
)
def test_header_that_would_not_be_one_header_is_refused(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(BadRequest):
        head(headers=[header])


def test_refused_request_reaches_nobody_and_costs_no_connection() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        sink = RecordingSink()
        sink.call = upstream.open(engine.instance, UpstreamRequest(path="/a b", headers=[], body=b""), sink)
        assert isinstance((await ended(sink)).error, BadRequest)
        assert engine.connections == []

    play(scene)


def test_head_request_has_no_body_and_its_connection_is_not_kept() -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        engine.on_request = lambda asked: asked.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        sink = await ended(post(upstream, engine.instance, b"", "HEAD"))
        assert (sink.events, sink.header(b"content-length")) == (["start", "finish"], b"5")
        await asyncio.wait_for(engine.connections[0].aborted.wait(), PATIENCE_S)

    play(scene)
