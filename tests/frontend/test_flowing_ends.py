"""How streams that go the short way end, in a whole frontend over real sockets: whoever ends them, and however, it
comes to the same as on the long way, and nothing is left behind. Their life before that: test_flowing.py."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn

from broker.config import Upstream
from frontend import conduit
from frontend.server import Server
from tests.frontend.conduits import EVENT, USAGE, framed
from tests.frontend.flowing import KINDS, Client, Kind, Player, Stage, turns
from tests.support.fake_engines import CHUNK, DONE, ERROR
from tests.support.waiting import PATIENCE_S, eventually

LAST = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


async def next_one(stage: Stage) -> None:
    """Whatever became of a stream, another client's goes well."""
    client = stage.client()
    asked = await stage.stream(client, b"next")
    await stage.flows_again(client, asked)
    asked.done(LAST)
    await client.hears_the_end()


# -- by the engine -------------------------------------------------------------------------------------------


def half_closes(asked: Any) -> None:
    asked.transport.write_eof()


def closes(asked: Any) -> None:
    asked.transport.close()


def resets(asked: Any) -> None:
    linger = struct.pack("ii", 1, 0)
    asked.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    asked.transport.abort()


HTTP_ENDS: dict[str, list[bytes | Callable[[Any], None]]] = {
    "the last chunk": [END],
    "the last chunk with an event": [framed(USAGE) + framed(LAST) + END],
    "the last chunk behind an event": [framed(USAGE), framed(LAST), END],
    "a last chunk in two": [framed(LAST) + END[:3], END[3:]],
    "a last chunk with an extension": [b"0;a=b\r\n\r\n"],
    "trailers": [framed(LAST), b"0\r\nX-T: 1\r\nX-U: 2\r\n\r\n"],
    "more than an answer": [framed(LAST) + END + b"HTTP/1.1 200 OK\r\n"],
    "no last chunk": [framed(LAST), closes],
    "no last chunk and half an end": [framed(LAST), half_closes],
    "half a chunk": [framed(LAST)[:9], closes],
    "half an event": [framed(b"data: hal"), closes],
    "half an event and a reset": [framed(b"data: hal"), resets],
    "a reset": [resets],
    "a reset behind an event": [framed(USAGE), resets],
    "an end right behind the last chunk": [framed(LAST) + END, closes],
    "a size that is none": [b"zz\r\ndata: 3\n\n\r\n"],
    "a size that is none behind an event": [framed(EVENT) + b"zz\r\nx\r\n"],
    "a chunk longer than its size": [b"8\r\ndata: 3\n\n\r\n"],
    "an endless size": [b"f" * 17 + b"\r\nx"],
    "no carriage return": [b"9\ndata: 3\n\n\n"],
    "an answer of its own": [b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n"],
}


@pytest.mark.parametrize("how", HTTP_ENDS.values(), ids=HTTP_ENDS)
def test_an_end_that_an_http_engine_makes(player: Player, how: list[bytes | Callable[[Any], None]]) -> None:
    async def scene(stage: Stage) -> int:
        client = stage.client()
        asked = await stage.stream(client)
        await stage.says(client, asked, EVENT, EVENT)
        for word in how:
            if isinstance(word, bytes):
                asked.raw(word)
            else:
                word(asked)
            await turns()
        await client.hears_the_end()
        await next_one(stage)
        return len(stage.engine.connections)

    player.both("http", scene)


NATIVE_ENDS: dict[str, Callable[[Any], list[Any]]] = {
    "done": lambda asked: [asked.delta(DONE, b"")],
    "done with the last bytes": lambda asked: [asked.delta(DONE, USAGE)],
    "an event and done": lambda asked: [asked.delta(CHUNK, USAGE), asked.delta(DONE, LAST)],
    "done twice": lambda asked: [asked.delta(DONE, LAST), asked.delta(DONE, LAST)],
    "more behind done": lambda asked: [asked.delta(DONE, LAST), asked.delta(CHUNK, EVENT)],
    "an error": lambda asked: [asked.delta(ERROR, b'{"error":{"message":"x"}}', 500)],
    "an error without its status": lambda asked: [asked.delta(ERROR, b'{"error":{"message":"x"}}')],
    "half an event and an error": lambda asked: [asked.delta(CHUNK, b"data: hal"), asked.delta(ERROR, b"{}", 500)],
    "a lost part": lambda asked: [asked.delta(CHUNK, EVENT), [asked.id, asked.sequence + 1, CHUNK, EVENT]],
    "a part that came before": lambda asked: [[asked.id, 0, CHUNK, EVENT], asked.delta(CHUNK, EVENT)],
    "a lost part behind half an event": lambda asked: [
        asked.delta(CHUNK, b"data: hal"),
        [asked.id, asked.sequence + 1, CHUNK, EVENT],
    ],
    "a lost part before the one that is due": lambda asked: [
        [asked.id, asked.sequence + 1, CHUNK, EVENT],
        asked.delta(CHUNK, EVENT),
    ],
    "done with the number of an event behind it": lambda asked: [
        [asked.id, asked.sequence, DONE, LAST],
        asked.delta(CHUNK, EVENT),
    ],
    "an unknown kind": lambda asked: [asked.delta(7, EVENT)],
    "data that is a text": lambda asked: [asked.delta(CHUNK, "text")],
    "a number that is none": lambda asked: [[asked.id, -1, CHUNK, EVENT]],
}


@pytest.mark.parametrize("end", NATIVE_ENDS.values(), ids=NATIVE_ENDS)
def test_an_end_that_a_native_engine_makes(player: Player, end: Callable[[Any], list[Any]]) -> None:
    async def scene(stage: Stage) -> bool:
        client = stage.client()
        asked = await stage.stream(client)
        await stage.says(client, asked, EVENT, EVENT)
        stage.engine.step(asked.route, end(asked))
        await client.hears_the_end()
        await next_one(stage)
        return asked.aborted.is_set()

    player.both("native", scene)


@pytest.mark.parametrize("kind", KINDS)
def test_an_engines_death(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> None:
        streams = await stage.streams(5)
        for client, asked in streams:
            await stage.says(client, asked, EVENT)
        stage.engine.die()
        for client, _ in streams:
            await client.hears_the_end()

    seen = player.both(kind, scene)
    assert seen.counts["BROKEN"] == 5


# -- by the client -------------------------------------------------------------------------------------------

LEAVES: dict[str, Callable[[Client], None]] = {
    "closes": Client.close,
    "resets": Client.reset,
    "ends its half": lambda client: client.socket.shutdown(socket.SHUT_WR),
}


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_leaves_reaches_the_engine(player: Player, kind: Kind, leave: Callable[[Client], None]) -> None:
    async def scene(stage: Stage) -> None:
        client = stage.client()
        asked = await stage.stream(client)
        await stage.says(client, asked, EVENT, EVENT)
        leave(client)
        await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)
        await next_one(stage)

    seen = player.both(kind, scene)
    assert seen.counts["GONE"] == 1


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize("kind", KINDS)
def test_clients_that_leave_while_their_engines_talk_on(
    player: Player, kind: Kind, leave: Callable[[Client], None]
) -> None:
    async def scene(stage: Stage) -> None:
        streams = await stage.streams(8)
        for client, _ in streams:
            for _, asked in streams:
                for _ in range(3):
                    asked.chunk(EVENT)
            leave(client)
            await asyncio.sleep(0)
        for _, asked in streams:
            await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)
            asked.chunk(EVENT)
        await next_one(stage)

    seen = player.play(kind, scene)
    assert seen.counts["GONE"] == 8
    assert seen.passed > 8


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_goes_to_whoever_has_the_descriptor_next(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> None:
        client = stage.client()
        asked = await stage.stream(client)
        await stage.says(client, asked, EVENT)
        (connection,) = stage.state.connections
        number = connection.transport.get_extra_info("socket").fileno()
        mine, theirs = socket.socketpair()
        client.close()
        await eventually(lambda: not os.path.exists(f"/proc/self/fd/{number}"), "its socket is closed")
        with mine, theirs:
            os.dup2(mine.fileno(), number)
            try:
                for _ in range(3):
                    asked.chunk(EVENT)
                    await turns()
                assert conduit.compiled is not None
                # Nor if somebody had kept a conduit that led there.
                with socket.socket() as other, socket.create_server(("127.0.0.1", 0)) as listener:
                    other.connect(listener.getsockname())
                    engine, _ = listener.accept()
                    with engine:
                        intake = conduit.compiled.Intake()
                        assert intake.join(stage.went[-1], other.fileno(), None)
                        engine.send(framed(EVENT))
                        intake.turn(0.0)
                theirs.setblocking(False)
                with pytest.raises(BlockingIOError):
                    theirs.recv(1)
            finally:
                os.close(number)

    assert player.play(kind, scene).passed > 0


@pytest.mark.parametrize("until", ["something is unsent", "it is paused"])
@pytest.mark.parametrize("how", ["ends", "dies", "its client leaves"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_end_while_its_client_has_not_read_all(player: Player, kind: Kind, how: str, until: str) -> None:
    async def scene(stage: Stage) -> tuple[bool, bool]:
        stage.port = await stage.listen(send_bytes=16 * 1024)
        client = stage.client(read_bytes=16 * 1024)
        asked = await stage.stream(client)
        said = b"data: 0\n\ndata: 1\n\n"
        while not (stage.is_paused or (stage.unsent and until == "something is unsent")):
            event = b"data: %b %d\n\n" % (b"x" * 3000, len(said))
            asked.chunk(event)
            said += event
            await asyncio.sleep(0)
        if how == "its client leaves":
            client.close()
            await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)
            client.heard = b""
            return False, False
        if how == "ends":
            asked.done(LAST)
        else:
            stage.engine.die()
        await turns()
        await client.hears_the_end()
        body, client.heard = client.body, b""  # how much there was is the kernel's to say
        if how == "ends":
            return body == said + LAST + b"<end>", True
        last = body.rindex(b"data: ")
        return said.startswith(body[:last].rstrip(b"\n")), b"error" in body[last:]

    long, short = (player.play(kind, scene, short=short) for short in (False, True))
    assert short.noted == long.noted == (how != "its client leaves", how != "its client leaves")
    assert short.counts == long.counts
    assert short.passed > 0


# -- by the frontend -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [EVENT, b"data: half an ev"], ids=["behind an event", "within an event"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_abort_tells_the_tokens_that_the_client_has_got(player: Player, kind: Kind, last: bytes) -> None:
    async def scene(stage: Stage) -> list[tuple[str, int]]:
        client = stage.client()
        asked = await stage.stream(client)
        await stage.says(client, asked, *[EVENT] * 7, last)
        ended = stage.forwarder.end_requests(["r1"])
        await client.hears_the_end()
        await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)
        await next_one(stage)
        return ended

    assert player.both(kind, scene, alike="heard").noted == [("r1", 9)]  # and one of 10 names the role


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_an_instance_that_is_removed_goes_on(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> None:
        client = stage.client()
        asked = await stage.stream(client)
        if kind == "http":
            stage.http.forget(stage.engine.instance.url)
        else:
            stage.native.forget(stage.engine.instance.incarnation)
        await stage.says(client, asked, EVENT, EVENT)
        await stage.flows_again(client, asked)
        asked.done(LAST)
        await client.hears_the_end()
        if kind == "http":  # native engines are told at the next beat
            await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)

    player.both(kind, scene)


@pytest.mark.parametrize("kind", KINDS)
def test_the_transports_close_ends_it_with_an_error(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> None:
        client = stage.client()
        asked = await stage.stream(client)
        await stage.says(client, asked, EVENT)
        (stage.http if kind == "http" else stage.native).close()
        asked.chunk(EVENT)
        await client.hears_the_end()

    seen = player.both(kind, scene)
    assert b"error" in seen.bodies[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_native_engine_that_will_not_wait_is_told_when_its_client_holds_too_much(player: Player, kind: Kind) -> None:
    """Over HTTP the engine is held back instead, and the client gets everything."""

    async def scene(stage: Stage) -> bool:
        stage.port = await stage.listen(send_bytes=16 * 1024)
        client = stage.client(read_bytes=16 * 1024)
        asked = await stage.stream(client)
        while not stage.is_paused:
            asked.chunk(b"data: %b\n\n" % (b"x" * 3000))
            await asyncio.sleep(0)
        for _ in range(20):
            asked.chunk(b"data: %b\n\n" % (b"y" * 3000))
            await turns()
        if kind == "native":
            await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)
        else:
            asked.done()
        await client.hears_the_end()
        got_all = client.body.count(b"y" * 3000) == 20
        client.heard = b""  # how much there was is the kernel's to say
        return got_all

    bound = Upstream(stream_buffer_bytes=16 * 1024)
    long, short = (player.play(kind, scene, short=short, upstream=bound) for short in (False, True))
    assert short.noted == long.noted == (kind == "http")
    assert short.counts == long.counts
    assert short.passed > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_stops_lets_it_end(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        stage.port = listener.getsockname()[1]
        config = uvicorn.Config(
            stage.inference,  # type: ignore[arg-type]  # uvicorn's word for the same
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
        )
        ready = asyncio.Event()
        server = Server(
            config,
            listener,
            stage.frontend.counters,
            lambda _: False,
            ready.set,
            lambda: None,
            stage.inference,
            stage.inference.bound,
            stage.outbox,
        )
        serving = asyncio.create_task(server.serve(sockets=[]))
        await asyncio.wait_for(ready.wait(), PATIENCE_S)
        client = stage.client()
        asked = await stage.stream(client)
        server.should_exit = True
        await eventually(lambda: listener.fileno() < 0, "it takes no more connections")
        await stage.says(client, asked, EVENT, EVENT)
        assert stage.flowing or conduit.compiled is None
        asked.done(LAST)
        await client.hears_the_end()
        await asyncio.wait_for(serving, PATIENCE_S)

    player.both(kind, scene)
