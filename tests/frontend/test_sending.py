"""Past the transport or through it: the same bytes in the same order, and errors are the transport's."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import uvloop

from frontend import sending
from frontend.outbox import Outbox, Outlet
from tests.support.waiting import eventually

PIECE = b"0123456789abcdef" * 4096


@pytest.fixture(params=["transport", "socket"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "transport":
        monkeypatch.setattr(sending, "send", None)
    elif sending.send is None:
        pytest.skip("it was not compiled here")
    return str(request.param)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    def run(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(test)

    return run


class Notes(asyncio.Protocol):
    def __init__(self) -> None:
        self.is_paused = False
        self.is_lost = False

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True


class Counted:
    """A transport that counts what is written through it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.is_closing = transport.is_closing
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.get_extra_info = transport.get_extra_info
        self.written = 0

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self.transport.write(data)


class Wire:
    """A connection: our end with its outlet, and the other end's socket, which reads when it is told to."""

    def __init__(self, notes: Notes, transport: asyncio.Transport, other: socket.socket) -> None:
        self.notes = notes
        self.transport = transport
        self.other = other
        self.counted = Counted(transport)
        self.outbox = Outbox(asyncio.get_running_loop())
        self.outlet = Outlet(cast("asyncio.WriteTransport", self.counted), self.outbox)

    def say(self, data: bytes) -> None:
        self.outlet.write(data)
        self.outbox.flush()

    async def hears(self, size: int) -> bytes:
        heard = bytearray()
        while len(heard) < size:
            part = await asyncio.get_running_loop().sock_recv(self.other, 1 << 16)
            if not part:
                break
            heard += part
        return bytes(heard)


@asynccontextmanager
async def wire() -> AsyncIterator[Wire]:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as other:
        other.connect(listener.getsockname())
        other.setblocking(False)
        ours, _ = listener.accept()
        ours.setblocking(False)
        transport, notes = await loop.connect_accepted_socket(Notes, ours)
        try:
            yield Wire(notes, transport, other)
        finally:
            transport.abort()
            await eventually(lambda: notes.is_lost, "the connection has ended")


def test_what_the_socket_takes_goes_past_the_transport(way: str, run: Callable[[Any], None]) -> None:
    async def test() -> None:
        async with wire() as it:
            it.say(b"one")
            it.say(b"two")
            assert await it.hears(6) == b"onetwo"
            assert it.counted.written == (6 if way == "transport" else 0)

    run(test())


def test_what_the_socket_does_not_take_is_the_transports_and_the_order_stays(run: Callable[[Any], None]) -> None:
    async def test() -> None:
        async with wire() as it:
            said = 0
            while not it.notes.is_paused:
                it.say(PIECE)
                said += len(PIECE)
            assert it.transport.get_write_buffer_size() > 0
            it.say(b"and this behind it")
            heard = await it.hears(said + 18)
            assert heard == PIECE * (said // len(PIECE)) + b"and this behind it"
            await eventually(lambda: not it.notes.is_paused, "the transport has written all")
            before = it.counted.written
            it.say(b"again at once")
            assert await it.hears(13) == b"again at once"
            assert sending.send is None or it.counted.written == before

    run(test())


def test_what_is_written_to_the_transport_by_others_comes_first(run: Callable[[Any], None]) -> None:
    async def test() -> None:
        async with wire() as it:
            size = 0
            while not it.transport.get_write_buffer_size():
                it.transport.write(PIECE)
                size += len(PIECE)
            it.say(b"end")
            assert (await it.hears(size + 3)).endswith(PIECE + b"end")

    run(test())


def test_a_connection_that_broke_is_the_transports_to_tell(run: Callable[[Any], None]) -> None:
    async def test() -> None:
        async with wire() as it:
            it.other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            it.other.close()  # with a reset
            while not it.notes.is_lost:
                it.say(b"is anybody there")
                await asyncio.sleep(0)

    run(test())


def test_nothing_goes_to_whoever_has_the_descriptor_next(run: Callable[[Any], None]) -> None:
    async def test() -> None:
        mine, theirs = socket.socketpair()
        with mine, theirs:
            async with wire() as old:
                number = old.transport.get_extra_info("socket").fileno()
                old.outlet.write(b"not for others")
                old.transport.abort()
                await eventually(lambda: old.notes.is_lost, "the connection has ended")
                os.dup2(mine.fileno(), number)
                try:
                    old.outbox.flush()
                    theirs.setblocking(False)
                    with pytest.raises(BlockingIOError):
                        theirs.recv(1)
                finally:
                    os.close(number)

    run(test())
