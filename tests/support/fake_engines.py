"""Engines that do exactly what a test says, over HTTP and over ZMQ, behind one face.

    asked = await engine.asked()          the next request that reached the engine
    asked.chunk(b"..."), asked.done(b"..."), asked.refuse(429, b"{}")
    await asked.aborted.wait()            the frontend gave it up
    engine.die()                          every connection ends, nothing listens any more

Made from bytes and plain msgpack; nothing of the transports under test is used.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, Protocol, cast

import msgpack
import zmq

from broker.types import EngineKind, Instance
from tests.support.waiting import PATIENCE_S

DATA_HELLO, PING, REQUEST, ABORT = 64, 65, 66, 67
DATA_WELCOME, PONG, STEP = 80, 81, 82
CHUNK, DONE, ERROR = 0, 1, 2


class Asked(Protocol):
    """A request that reached the engine."""

    path: str
    body: bytes
    aborted: asyncio.Event

    def chunk(self, data: bytes) -> None: ...

    def done(self, data: bytes = b"") -> None: ...

    def refuse(self, status: int, body: bytes) -> None: ...


class FakeEngine(Protocol):
    instance: Instance

    async def asked(self) -> Asked: ...

    def die(self) -> None: ...

    def close(self) -> None: ...


# -- HTTP --------------------------------------------------------------------------------------------------


class HttpAsked(asyncio.Protocol):
    """One connection, which serves as its request: with several requests, the last one. `raw` writes any bytes."""

    def __init__(self, engine: HttpEngine) -> None:
        self.engine = engine
        self.path = ""
        self.body = b""
        self.head = b""
        self.count = 0
        """Requests this connection has carried."""
        self.aborted = asyncio.Event()
        self.transport: asyncio.Transport
        self._received = bytearray()
        self._started = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self.engine.connections.append(self)
        self.engine.on_connect(self)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (split := self._received.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._received[:split])
            length = next(
                (
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                ),
                0,
            )
            if len(self._received) < split + 4 + length:
                return
            self.head = head
            self.path = head.split(b" ")[1].decode()
            self.body = bytes(self._received[split + 4 : split + 4 + length])
            del self._received[: split + 4 + length]
            self._started = False
            self.count += 1
            self.engine.on_request(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.aborted.set()

    def raw(self, data: bytes) -> None:
        if not self.transport.is_closing():  # what an engine says to nobody is lost
            self.transport.write(data)

    def chunk(self, data: bytes) -> None:
        if not self._started:
            self._started = True
            self.raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n")
            self.raw(b"Transfer-Encoding: chunked\r\n\r\n")
        self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    def done(self, data: bytes = b"") -> None:
        if self._started:
            if data:
                self.chunk(data)
            self.raw(b"0\r\n\r\n")
        else:
            self.raw(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(data), data)
            )

    def refuse(self, status: int, body: bytes) -> None:
        self.raw(
            b"HTTP/1.1 %d No\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (status, len(body), body)
        )


class HttpEngine:
    """`await HttpEngine.open()`. `on_request` and `on_connect` may be replaced by a script."""

    def __init__(self) -> None:
        self.connections: list[HttpAsked] = []
        self._queue: asyncio.Queue[HttpAsked] = asyncio.Queue()
        self.on_request: Callable[[HttpAsked], None] = self._queue.put_nowait
        self.on_connect: Callable[[HttpAsked], None] = lambda connection: None
        self.instance: Instance
        self.port = 0
        self._server: asyncio.Server

    @classmethod
    async def open(cls, host: str = "127.0.0.1") -> HttpEngine:
        engine = cls()
        engine._server = await asyncio.get_running_loop().create_server(lambda: HttpAsked(engine), host, 0)
        engine.port = engine._server.sockets[0].getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        engine.instance = Instance(url=f"http://{shown}:{engine.port}")
        return engine

    async def asked(self) -> HttpAsked:
        return await asyncio.wait_for(self._queue.get(), PATIENCE_S)

    def die(self) -> None:
        self._server.close()
        for connection in self.connections:
            connection.transport.abort()

    def close(self) -> None:
        self.die()


# -- ZMQ ---------------------------------------------------------------------------------------------------


class ZmqAsked:
    def __init__(self, engine: ZmqEngine, route: bytes, fields: list[Any], body: bytes) -> None:
        self.engine = engine
        self.route = route
        self.incarnation, self.id, self.path, self.stream, self.headers, self.transfer = fields[1:7]
        self.body = body
        self.aborted = asyncio.Event()
        self.sequence = 0

    def delta(self, kind: int, data: bytes, *more: object) -> list[object]:
        """The next delta, not yet sent."""
        made = [self.id, self.sequence, kind, data, *more]
        self.sequence += 1
        return made

    def chunk(self, data: bytes) -> None:
        self.engine.step(self.route, [self.delta(CHUNK, data)])

    def done(self, data: bytes = b"") -> None:
        self.engine.step(self.route, [self.delta(DONE, data)])

    def refuse(self, status: int, body: bytes) -> None:
        self.engine.step(self.route, [self.delta(ERROR, body, status)])


class ZmqEngine:
    """`await ZmqEngine.open(context)`. `mute`: it hears, and answers neither hello nor ping."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str = "tcp://127.0.0.1:*") -> None:
        self.incarnation = os.urandom(16)
        self.mute = False
        self.heard: list[list[Any]] = []
        """Every message but pings, without the body frame."""
        self.requests: dict[int, ZmqAsked] = {}
        self._queue: asyncio.Queue[ZmqAsked] = asyncio.Queue()
        self.on_request: Callable[[ZmqAsked], None] = self._queue.put_nowait
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        self._socket.bind(endpoint)
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.endpoint = bound.rstrip(b"\0").decode()
        self.instance = Instance(url=self.endpoint, engine=EngineKind.NATIVE, incarnation=self.incarnation)
        self._fd = self._socket.getsockopt(zmq.FD)
        self._loop.add_reader(self._fd, self._read)
        self._open = True

    @classmethod
    async def open(cls, context: zmq.Context[zmq.Socket[bytes]]) -> ZmqEngine:
        return cls(context)

    async def asked(self) -> ZmqAsked:
        return await asyncio.wait_for(self._queue.get(), PATIENCE_S)

    def send(self, route: bytes, frame: bytes, *more: bytes) -> None:
        self._socket.send_multipart([route, frame, *more])
        self._loop.call_soon(self._read)

    def step(self, route: bytes, deltas: list[Any], incarnation: bytes | None = None) -> None:
        self.send(route, msgpack.packb([STEP, incarnation or self.incarnation, deltas]))

    def die(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._fd)
            self._socket.close()

    def close(self) -> None:
        self.die()

    def _read(self) -> None:
        while self._open and self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator]  # always int
            route, frame, *rest = self._socket.recv_multipart()
            fields = msgpack.unpackb(frame)
            if fields[0] == PING:
                if not self.mute:
                    self.send(route, msgpack.packb([PONG, self.incarnation]))
                continue
            self.heard.append(fields)
            if fields[0] == DATA_HELLO:
                if not self.mute:
                    self.send(route, msgpack.packb([DATA_WELCOME, 1, self.incarnation]))
            elif fields[0] == REQUEST:
                asked = self.requests[fields[2]] = ZmqAsked(self, route, fields, rest[0])
                self.on_request(asked)
            elif fields[0] == ABORT:
                for number in fields[1]:
                    if number in self.requests:
                        self.requests[number].aborted.set()
