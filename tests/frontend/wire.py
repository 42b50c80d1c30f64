"""One client's connection without a socket: what it sends is given in bytes, and what it gets is kept in bytes.

The protocol, uvicorn's and ours, is the real one; only the transport is played. What is written in one turn of the
loop is kept as one piece.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal, cast

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from frontend.api import Inference
from frontend.connection import Connection
from frontend.idle import IdleConnections
from frontend.lean import Lean
from frontend.upstream.base import Headers
from tests.frontend.fakes import Frontend

Path = Literal["lean", "plain"]
"""The two ways an inference request may go. (Of the lean one a third is a part: a head that was seen before.)"""
PATHS: tuple[Path, ...] = ("lean", "plain")
HIGH_WATER = 64 * 1024


class Transport:
    """What a protocol sees of asyncio; the test plays the network."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self.protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._high = HIGH_WATER
        self._held: list[bytes] = []
        self._flushing = False
        self._paused = False
        self._stuck = False
        self._closing = False
        self.lost = False
        self.aborted = False
        self.reads = True
        self.pieces: list[bytes] = []
        """What has left, piece by piece."""

    # -- the network's side ------------------------------------------------------------------------------------

    def stick(self) -> None:
        """The client reads no more."""
        self._stuck = True

    def flow(self) -> None:
        """It reads again."""
        self._stuck = False
        self._flush()

    def reset(self) -> None:
        """The client's end of the connection is gone."""
        self._lose(ConnectionResetError("reset"))

    def end(self) -> None:
        """The client ends its half."""
        if not self._closing and not self.protocol.eof_received():
            self.close()

    # -- the protocol's side -----------------------------------------------------------------------------------

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = cast("asyncio.Protocol", protocol)

    def write(self, data: bytes) -> None:
        if self.lost or self.aborted:
            return
        assert not self._closing, "written after close"
        self._held.append(data)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)
        if self.get_write_buffer_size() > self._high and not self._paused:
            self._paused = True
            self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self._held))

    def set_write_buffer_limits(self, high: int) -> None:
        self._high = high

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self._flush)

    def abort(self) -> None:
        self._closing = self.aborted = True
        self._held.clear()
        self._loop.call_soon(self._lose, None)

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True

    def get_extra_info(self, name: str) -> Any:
        return {"sockname": ("127.0.0.1", 80), "peername": ("127.0.0.1", 1)}.get(name)

    def _flush(self) -> None:
        self._flushing = False
        if self._stuck:
            return
        if self._held:
            self.pieces.append(b"".join(self._held))
            self._held.clear()
        if self._paused:
            self._paused = False
            self.protocol.resume_writing()
        if self._closing and not self._held:
            self._lose(None)

    def _lose(self, error: Exception | None) -> None:
        self._closing = True
        if not self.lost:
            self.lost = True
            self.protocol.connection_lost(error)


class Wire:
    """A connection to a frontend, of which `app` is the application and `inference` goes the `path` given."""

    def __init__(
        self,
        frontend: Frontend,
        path: Path,
        inference: Inference,
        app: ASGIApp | None = None,
        lean: Lean | None = None,
    ) -> None:
        """`lean`: what it shares with other connections on the lean path, the heads that they have seen among it."""
        config = uvicorn.Config(app or inference, ws="none", lifespan="off", log_config=None, access_log=False)  # type: ignore[arg-type]  # uvicorn's word for the same
        self.state = ServerState()
        self.idle = IdleConnections(asyncio.get_running_loop(), 75.0)
        if path == "lean" and lean is None:
            lean = Lean(inference, self.state)
        self.connection = Connection(
            config,
            self.state,
            {},
            frontend.counters,
            self.idle,
            lean if path == "lean" else None,
            bound=frontend.config.upstream.stream_buffer_bytes,
        )
        self.transport = Transport(self.connection)
        self.connection.connection_made(cast("asyncio.Transport", self.transport))

    def feed(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.protocol.data_received(data)

    @property
    def out(self) -> bytes:
        """All that the client got."""
        return b"".join(self.transport.pieces)

    async def settle(self) -> None:
        """Lets everything that can happen without further input happen."""
        for _ in range(30):
            await asyncio.sleep(0)

    def close(self) -> None:
        """Ends what a test left open."""
        if not self.transport.lost:
            self.transport.reset()
        self.idle.close()


class Answers:
    """What a client makes of the bytes."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.pairs: Headers = []
        self.bodies: list[bytes] = []
        """Body bytes of each piece that had some."""
        self.complete = False

    def feed(self, piece: bytes) -> None:
        self.bodies.append(b"")
        self._parser.feed_data(piece)
        if not self.bodies[-1]:
            self.bodies.pop()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.pairs.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.bodies[-1] += body

    def on_message_complete(self) -> None:
        self.complete = True


class Exchange:
    """`async with Exchange(wire, ...)` sends a request; leaving the block waits until nothing more happens."""

    def __init__(
        self,
        wire: Wire,
        path: str = "/v1/chat/completions",
        *parts: bytes,
        headers: Headers | None = None,
        query: bytes = b"",
        method: str = "POST",
        whole: bool = True,
    ) -> None:
        """The body comes in `parts`, chunked if the headers say so; with `whole` false it goes on after them."""
        self.wire = wire
        target = path.encode() + (b"?" + query if query else b"")
        sent = list(headers or [])
        names = {name for name, _ in sent}
        self._chunked = b"transfer-encoding" in names
        if not self._chunked and b"content-length" not in names:
            length = sum(map(len, parts)) + (0 if whole else 1)
            sent.append((b"content-length", b"%d" % length))
        if b"host" not in names:
            sent.insert(0, (b"host", b"router"))
        lines = b"".join(b"%b: %b\r\n" % pair for pair in sent)
        self._head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method.encode(), target, lines)
        self._parts = parts
        self._whole = whole

    async def __aenter__(self) -> Exchange:
        self.wire.feed(self._head)
        for part in self._parts:
            await self.part(part)
        if self._chunked and self._whole:
            self.wire.feed(b"0\r\n\r\n")
        await self.wire.settle()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.wire.settle()
        self.wire.close()
        await self.wire.settle()

    async def part(self, data: bytes) -> None:
        self.wire.feed(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        await self.wire.settle()

    async def turns(self) -> None:
        await self.wire.settle()

    def leave(self) -> None:
        """The client ends; whether it was killed or only its half of the connection ended cannot be told apart."""
        self.wire.transport.end()

    @property
    def answers(self) -> Answers:
        answers = Answers()
        for piece in self.wire.transport.pieces:
            answers.feed(piece)
        return answers

    @property
    def status(self) -> int:
        return self.answers.status

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.answers.pairs}

    @property
    def pieces(self) -> list[bytes]:
        """The parts of the body that left together."""
        return self.answers.bodies

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    @property
    def complete(self) -> bool:
        return self.answers.complete

    def json(self) -> Any:
        return json.loads(self.body)


async def ask(wire: Wire, path: str = "/v1/chat/completions", *parts: bytes, **fields: Any) -> Exchange:
    """A request from its beginning to its end."""
    async with Exchange(wire, path, *parts, **fields) as exchange:
        pass
    return exchange
