"""ZeroMQ's protocol as bytes, against libzmq itself and against what no libzmq would say."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from broker import zmtp
from broker.config import Config, Timeouts
from broker.errors import ConnectFailed, UpstreamBroken, WireError
from broker.types import EngineKind, Instance
from frontend.upstream.base import UpstreamRequest
from frontend.upstream.zmq import ZmqUpstream
from frontend.upstream.zmq_address import Address
from frontend.upstream.zmq_peers import MARK_BYTES
from tests.support.fake_engines import ZmqEngine
from tests.support.sinks import RecordingSink
from tests.support.waiting import PATIENCE_S, eventually

READY = zmtp.ready(b"")
OPENING = zmtp.GREETING + READY


def frame(data: bytes, *, more: bool = False) -> bytes:
    return zmtp.head(len(data), more=more) + data


def command(name: bytes, rest: bytes = b"") -> bytes:
    whole = bytes((len(name),)) + name + rest
    return bytes((4, len(whole))) + whole


def read(reader: zmtp.Reader, data: bytes) -> list[bytes | memoryview | None]:
    """The messages in it; None stands for one of several frames."""
    reader.feed(data)
    found: list[bytes | memoryview | None] = []
    while True:
        try:
            message = reader.next()
        except WireError:
            found.append(None)
        else:
            if message is None:
                return found
            found.append(message)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65_535, 65_536, zmtp.MAX_MESSAGE_BYTES])
@pytest.mark.parametrize("more", [False, True])
def test_heads_of_all_sizes(size: int, more: bool) -> None:
    expected = bytes((more, size)) if size < 256 else bytes((2 | more,)) + size.to_bytes(8, "big")
    assert zmtp.head(size, more=more) == expected


@given(
    st.lists(st.one_of(st.binary(max_size=2000), st.none(), st.just(b"PING")), max_size=8),
    st.lists(st.integers(1, 700), max_size=40),
)
def test_messages_are_the_same_however_the_bytes_are_cut(messages: list[bytes | None], cuts: list[int]) -> None:
    data = OPENING
    for message in messages:
        if message == b"PING":
            data += command(b"PING", b"\0\1context")
        elif message is None:
            data += frame(b"a", more=True) + frame(b"b" * 300, more=True) + frame(b"")
        else:
            data += frame(message)
    reader = zmtp.Reader()
    found: list[bytes | memoryview | None] = []
    for size in cuts:
        found += read(reader, data[:size])
        data = data[size:]
    found += read(reader, data)
    assert found == [m for m in messages if m != b"PING"]
    assert reader.replies == [command(b"PONG", b"context")] * messages.count(b"PING")


@given(
    st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=6), max_size=8),
    st.lists(st.integers(1, 400), max_size=40),
)
def test_parts_are_the_same_however_the_bytes_are_cut(messages: list[list[bytes]], cuts: list[int]) -> None:
    data = OPENING
    for message in messages:
        data += b"".join(frame(part, more=True) for part in message[:-1]) + frame(message[-1])
        data += command(b"PING", b"\0\1")
    reader = zmtp.Reader()
    found: list[list[bytes]] = []
    for size in [*cuts, len(data)]:
        reader.feed(data[:size])
        data = data[size:]
        while (parts := reader.parts(4)) is not None:
            found.append(parts)
    assert found == [message[:4] for message in messages]


def test_a_frame_beyond_the_readers_limit_is_said_to_be_one() -> None:
    reader = zmtp.Reader(1000)
    reader.feed(OPENING + frame(bytes(1000)) + frame(bytes(1001)))
    assert reader.parts(1) == [bytes(1000)]
    with pytest.raises(UpstreamBroken, match="limit is 1000"):
        reader.parts(1)


def test_what_was_fed_before_the_last_was_taken_is_kept() -> None:
    reader = zmtp.Reader()
    reader.feed(OPENING + frame(b"1") + frame(b"2") + frame(b"3")[:2])
    assert reader.next() == b"1"
    reader.feed(frame(b"3")[2:] + frame(b"4"))
    assert [reader.next() for _ in range(4)] == [b"2", b"3", b"4", None]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "does not speak ZMTP"),
        (b"\xff\0\0\0\0\0\0\0\0\x7e", "does not speak ZMTP"),
        (zmtp.GREETING[:10] + b"\2", "ZMTP 2"),
        (zmtp.GREETING[:12] + b"PLAIN".ljust(20, b"\0") + bytes(32), "security"),
        (zmtp.GREETING + frame(b"x"), "before READY"),
        (zmtp.GREETING + command(b"ERROR", b"\4nope"), "nope"),
        (OPENING + b"\2" + (zmtp.MAX_MESSAGE_BYTES + 1).to_bytes(8, "big"), "limit"),
    ],
)
def test_what_is_no_peer_of_ours_is_said_to_be_none(data: bytes, why: str) -> None:
    for said, size in ((data, len(data)), (data + bytes(64), 1)):  # at once, or byte by byte
        pieces = [said[at : at + size] for at in range(0, len(said), size)]
        reader = zmtp.Reader()
        with pytest.raises(UpstreamBroken, match=why):
            [read(reader, piece) for piece in pieces]


@given(st.binary(max_size=200))
def test_noise_is_refused_or_waited_for(noise: bytes) -> None:
    reader = zmtp.Reader()
    try:
        read(reader, OPENING)
        read(reader, noise)
    except UpstreamBroken:
        pass


@pytest.mark.parametrize("kind", ["ipc", "abstract", "tcp", "tcp6"])
def test_libzmq_is_understood_over_every_way(kind: str, tmp_path: Path) -> None:
    if kind == "tcp6":
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("there is no IPv6 here")
    endpoints = {"ipc": f"ipc://{tmp_path}/e", "abstract": f"ipc://@{tmp_path}", "tcp": "tcp://127.0.0.1:*"}

    async def scene() -> None:
        with zmq.Context() as context:
            engine = ZmqEngine(context, endpoints.get(kind, "tcp://[::1]:*"))
            upstream = ZmqUpstream(Config())
            sink = RecordingSink()
            body = bytes(range(256)) * 4096
            request = UpstreamRequest(path="/p", headers=[], body=body, stream=True)
            sink.call = upstream.open(engine.instance, request, sink)
            asked = await engine.asked()
            assert asked.body == body
            asked.chunk(body)
            asked.done(b"end")
            await eventually(lambda: sink.ended.is_set(), sink)
            assert sink.body == body + b"end"
            upstream.close()
            engine.close()

    asyncio.run(scene())


@pytest.mark.parametrize("url", ["ipc://", "tcp://host", "tcp://:1", "tcp://h:0", "tcp://h:1/x", "http://h:1", "x", ""])
def test_a_url_without_an_address_is_refused(url: str) -> None:
    with pytest.raises(ConnectFailed):
        Address(url)


async def refused(url: str) -> None:
    """A request to this address ends as `ConnectFailed`, before anybody waits for an answer."""
    upstream = ZmqUpstream(Config(timeouts=Timeouts(connect_secs=2 * PATIENCE_S)))  # it is not this limit that ends it
    sink = RecordingSink()
    request = UpstreamRequest(path="/p", headers=[], body=b"", stream=True)
    instance = Instance(url=url, engine=EngineKind.NATIVE, incarnation=b"n" * 16)
    sink.call = upstream.open(instance, request, sink)
    await asyncio.wait_for(sink.ended.wait(), PATIENCE_S)
    assert isinstance(sink.error, ConnectFailed)
    upstream.close()


@pytest.mark.parametrize("url", ["tcp://a..b:1", "ipc://a\0b", f"ipc:///{'x' * 200}", "ipc:///nobody/listens"])
def test_an_address_that_leads_nowhere_is_connect_failed_at_once(url: str) -> None:
    asyncio.run(refused(url))


def test_what_an_engine_that_does_not_read_makes_us_say_is_bounded() -> None:
    pings = command(b"PING", b"\0\1" + b"c" * 16) * 10_000

    async def scene() -> None:
        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(OPENING)
            while not writer.is_closing():
                writer.write(pings)
                await writer.drain()

        async with await asyncio.start_server(flood, "127.0.0.1", 0) as server:
            url = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            upstream = ZmqUpstream(Config())
            upstream.see([Instance(url=url, engine=EngineKind.NATIVE, incarnation=b"n" * 16)])
            (peer,) = upstream._peers._by_url.values()
            await eventually(lambda: peer.is_full, upstream)
            assert peer._transport is not None
            for _ in range(20):
                await eventually(lambda heard=peer.heard_at: peer.heard_at > heard, upstream)
            assert peer._transport.get_write_buffer_size() < 2 * MARK_BYTES
            upstream.close()

    asyncio.run(scene())


def test_a_server_of_something_else_is_connect_failed_at_once() -> None:
    async def scene() -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await reader.read()
            writer.close()

        async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
            url = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await refused(url)

    asyncio.run(scene())
