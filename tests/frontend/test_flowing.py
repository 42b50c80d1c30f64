"""A stream that goes the short way, in a whole frontend over real sockets: nobody may tell that it did, neither its
client nor its engine, nor the log and the counters. How such streams end: test_flowing_ends.py."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import ssl
from pathlib import Path
from typing import Any

import pytest

from frontend import conduit
from tests.frontend.conduits import EVENT, USAGE, framed
from tests.frontend.flowing import KINDS, Kind, Player, Stage, turns
from tests.support.fake_engines import CHUNK
from tests.support.waiting import PATIENCE_S, eventually

DONE = b"data: [DONE]\n\n"
FILES = Path(__file__).parents[1] / "fixtures" / "tls"


@pytest.mark.parametrize("kind", KINDS)
def test_events_in_turn_come_as_the_same_bytes(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> None:
        client = stage.client()
        asked = await stage.stream(client)
        await stage.says(client, asked, *[b'data: {"n": %d}\n\n' % number for number in range(50)])
        asked.chunk(USAGE)
        asked.done(DONE)
        await client.hears_the_end()

    seen = player.both(kind, scene)
    assert seen.passed > 40
    (line,) = seen.lines
    assert " tokens=42 outcome=done" in line


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_told_wherever_the_usage_came(player: Player, kind: Kind, before: int, behind: int) -> None:
    """The first events go the long way, and then the short one begins."""

    async def scene(stage: Stage) -> None:
        client = stage.client()
        client.ask()
        asked = await stage.engine.asked()
        await stage.says(client, asked, *[EVENT] * before, USAGE, *[DONE] * behind)
        asked.done()
        await client.hears_the_end()

    long, short = (player.play(kind, scene, short=short) for short in (False, True))
    assert short.lines == long.lines
    assert " tokens=42 " in short.lines[0]


@pytest.mark.parametrize("kind", KINDS)
def test_in_lockstep_even_the_frames_are_the_same(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> None:
        client = stage.client()
        asked = await stage.stream(client)
        for size in (9, 10, 15, 16, 255, 256, 1023, 1024, 4095, 4096, 20_000):
            await stage.says(client, asked, b"data: %b\n\n" % (b"x" * (size - 8)))
        asked.done()
        await client.hears_the_end()

    player.both(kind, scene, alike="heard")


@pytest.mark.parametrize("kind", KINDS)
def test_more_streams_than_are_read_at_once_each_get_their_own(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> None:
        streams = await stage.streams(70)
        for round_ in range(5):
            said = [b"data: %d of %d\n\n" % (round_, number) for number in range(len(streams))]
            if kind == "http":
                for (_, asked), event in zip(streams, said, strict=True):
                    asked.chunk(event)
            else:
                deltas = [asked.delta(CHUNK, event) for (_, asked), event in zip(streams, said, strict=True)]
                stage.engine.step(streams[0][1].route, deltas)
            for (client, _), event in zip(streams, said, strict=True):
                await client.hears(event)
        for _, asked in streams:
            asked.done(DONE)
        for client, _ in streams:
            await client.hears_the_end()

    seen = player.both(kind, scene)
    assert seen.passed >= 3 * 70
    assert len(seen.lines) == 70


@pytest.mark.parametrize("kind", KINDS)
def test_the_connections_serve_the_next_stream_and_that_flows_too(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> int:
        client = stage.client()
        for _ in range(3):
            asked = await stage.stream(client)
            await stage.flows_again(client, asked)
            asked.done(DONE)
            await client.hears_the_end()
            client.heard = b""
        return len(stage.engine.connections) if kind == "http" else 1

    assert player.both(kind, scene).noted == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_sent_ahead_has_its_turn_behind_a_stream_that_flows(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> bytes:
        client = stage.client()
        asked = await stage.stream(client)
        client.ask(b"r2")
        await turns()
        await stage.says(client, asked, EVENT, EVENT)
        asked.done(DONE)
        await client.hears_the_end()
        asked = await stage.engine.asked()
        await stage.says(client, asked, EVENT)
        await stage.flows_again(client, asked)
        asked.done()
        await client.hears_the_end()
        heard, client.heard = client.heard, b""
        return heard[heard.index(DONE) :]

    player.both(kind, scene)


# -- what does not fit in between ----------------------------------------------------------------------------

HTTP_PIECES = {
    "several in one read": [framed(b"data: 3\n\n") + framed(b"data: 4\n\n") + framed(EVENT)],
    "one with an extension": [b"9;a=b\r\ndata: 3\n\n\r\n" + framed(EVENT)],
    "one cut within its size": [framed(bytes(20))[:1], framed(bytes(20))[1:], framed(EVENT)],
    "one cut within its data": [framed(b"data: 3\n\n")[:5], framed(b"data: 3\n\n")[5:], framed(EVENT)],
    "one cut before its end": [framed(b"data: 3\n\n")[:-1], framed(b"data: 3\n\n")[-1:], framed(EVENT)],
    "one and a part of the next": [framed(b"data: 3\n\n") + framed(EVENT)[:9], framed(EVENT)[9:]],
    "one byte by byte": [bytes((byte,)) for byte in framed(EVENT)],
    "one that reads like chunks within": [framed(framed(b"a") + b"0\r\n\r\n"), framed(EVENT)],
    "one larger than a read": [framed(b"x" * 300_000), framed(EVENT)],
    "one that fills a read": [framed(b"x" * (64 * 1024 - 8)), framed(EVENT)],
    "odd but good sizes": [b"000A\r\n0123456789\r\n", b"0000001\r\nx\r\n", b"00000001\r\nx\r\n", framed(EVENT)],
}


@pytest.mark.parametrize("pieces", HTTP_PIECES.values(), ids=HTTP_PIECES)
def test_whatever_chunks_come_in_between_the_stream_flows_again(player: Player, pieces: list[bytes]) -> None:
    async def scene(stage: Stage) -> None:
        client = stage.client()
        asked = await stage.stream(client)
        for piece in pieces:
            asked.raw(piece)
            await turns()
        await client.hears(EVENT)
        await stage.flows_again(client, asked)
        asked.done()
        await client.hears_the_end()

    player.both("http", scene)


def _several(asked: Any) -> None:
    asked.engine.step(asked.route, [asked.delta(CHUNK, b"data: %d\n\n" % number) for number in range(5)])


def _with_others(asked: Any) -> None:
    strangers = [[number, 0, CHUNK, b"not yours"] for number in (0, asked.id + 1, 2**40)]
    asked.engine.step(asked.route, [*strangers, asked.delta(CHUNK, b"data: 3\n\n"), *strangers])


def _fifth_value(asked: Any) -> None:
    asked.engine.step(asked.route, [asked.delta(CHUNK, b"data: 3\n\n", 200)])


def _empty(asked: Any) -> None:
    asked.engine.step(asked.route, [asked.delta(CHUNK, b""), asked.delta(CHUNK, b"data: 3\n\n")])


def _malformed_stranger(asked: Any) -> None:
    asked.engine.step(asked.route, [["x"], asked.delta(CHUNK, b"data: 3\n\n")])


def _another_life(asked: Any) -> None:
    asked.engine.step(asked.route, [[asked.id, asked.sequence, CHUNK, b"not yours"]], incarnation=bytes(16))


def _noise(asked: Any) -> None:
    asked.engine.send(asked.route, b"\xc1 noise")


def _many_steps(asked: Any) -> None:
    for number in range(40):
        asked.chunk(b"data: %d\n\n" % number)


def _large(asked: Any) -> None:
    asked.chunk(b"x" * 300_000)


@pytest.mark.parametrize(
    "say",
    [_several, _with_others, _fifth_value, _empty, _malformed_stranger, _another_life, _noise, _many_steps, _large],
)
def test_whatever_a_native_engine_says_in_between_the_stream_flows_again(player: Player, say: Any) -> None:
    async def scene(stage: Stage) -> None:
        client = stage.client()
        asked = await stage.stream(client)
        say(asked)
        await stage.says(client, asked, EVENT)
        await stage.flows_again(client, asked)
        asked.done()
        await client.hears_the_end()

    player.both("native", scene)


# -- clients that do not keep up -----------------------------------------------------------------------------


@pytest.mark.parametrize("until", ["something is unsent", "it is paused"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_reads_late_gets_all_in_order_and_flows_again(player: Player, kind: Kind, until: str) -> None:
    async def scene(stage: Stage) -> None:
        stage.port = await stage.listen(send_bytes=16 * 1024)
        client = stage.client(read_bytes=16 * 1024)
        asked = await stage.stream(client)
        size = 0
        for number in itertools.count():
            if stage.is_paused or (stage.unsent and until == "something is unsent"):
                break
            asked.chunk(b"data: %d %b\n\n" % (number, b"x" * 3000))
            size += 3000
            await asyncio.sleep(0)
        for _ in range(20 if stage.is_paused else 1):  # which wait their turn
            asked.chunk(b"data: late\n\n")
        await turns()
        assert not (stage.is_paused and stage.flowing)
        asked.chunk(EVENT)
        await client.hears(EVENT)
        assert client.heard.count(b"x" * 3000) == number
        for at in range(number):
            assert client.heard.index(b"data: %d x" % at) < client.heard.index(b"data: late")
        await eventually(lambda: not stage.is_paused, "it reads on")
        await stage.flows_again(client, asked)
        asked.done(DONE)
        await client.hears_the_end()
        client.heard = b""  # how much there was is the kernel's to say

    long, short = (player.play(kind, scene, short=short) for short in (False, True))
    assert short.counts == long.counts
    assert short.passed > 0


# -- who never goes that way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_clients_behind_tls_never_do(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(FILES / "cert.pem", FILES / "key.pem")
        trusting = ssl.create_default_context(cafile=str(FILES / "cert.pem"))
        port = await stage.listen(tls=context)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        body = b'{"model":"tiny","messages":[],"stream":true}'
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        asked = await stage.engine.asked()
        for number in range(5):
            asked.chunk(b"data: %d\n\n" % number)
            await asyncio.wait_for(reader.readuntil(b"data: %d\n\n" % number), PATIENCE_S)
        asked.done()
        await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), PATIENCE_S)
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()
        assert not stage.went

    player.play(kind, scene)


@pytest.mark.parametrize("kind", KINDS)
def test_clients_that_know_no_chunks_never_do(player: Player, kind: Kind) -> None:
    async def scene(stage: Stage) -> None:
        client = stage.client()
        client.ask(version=b"1.0")
        asked = await stage.engine.asked()
        said = [b"data: %d\n\n" % number for number in range(5)]
        heard = b""
        for event in said:
            asked.chunk(event)
            while not heard.endswith(event):
                part = await asyncio.get_running_loop().sock_recv(client.socket, 1 << 16)
                assert part
                heard += part
        asked.done()
        assert await asyncio.get_running_loop().sock_recv(client.socket, 1 << 16) == b""
        assert heard.partition(b"\r\n\r\n")[2] == b"".join(said)
        assert not stage.went

    player.play(kind, scene)


def test_without_descriptors_for_it_http_engines_streams_go_the_long_way(
    player: Player,
) -> None:
    async def scene(stage: Stage) -> None:
        def refused() -> None:
            raise OSError(errno.EMFILE, "too many")

        vars(conduit.compiled)["Intake"] = refused
        for number in range(2):
            client = stage.client()
            client.ask(b"r%d" % number)
            asked = await stage.engine.asked()
            await stage.says(client, asked, *[EVENT] * 4)
            asked.done(DONE)
            await client.hears_the_end()

    seen = player.play("http", scene)
    assert seen.passed == 0
    assert [line for line in seen.lines if "the long way" in line] == [
        "streams of HTTP engines go the long way, as there is no descriptor for the short one: [Errno 24] too many"
    ]
