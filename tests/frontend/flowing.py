"""A whole frontend over real sockets in this process, for tests of streams that flow: client, frontend, one engine.

`both` plays a scene twice, with the short way (frontend/conduit.py) and without it, and compares what there is to see.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pytest
import uvicorn
import uvloop
import zmq
from uvicorn.server import ServerState

from broker.counters import CounterColumn, TotalColumn
from broker.types import Role
from frontend import conduit
from frontend.api import Inference
from frontend.connection import Connection
from frontend.forwarder import Forwarder
from frontend.idle import IdleConnections
from frontend.lean import Lean
from frontend.outbox import Outbox
from frontend.upstream.http import HttpUpstream
from frontend.upstream.zmq import ZmqUpstream
from tests.frontend.fakes import Frontend
from tests.support.fake_engines import HttpEngine, ZmqEngine
from tests.support.waiting import PATIENCE_S, eventually

if TYPE_CHECKING:
    from frontend._conduit import Conduit

Kind = Literal["http", "native"]
KINDS: tuple[Kind, ...] = ("http", "native")
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
BODY = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"stream":true}'
END = b"<end>"
"""In the place of an answer's last chunk."""
_VARYING = re.compile(r"(?<= ttft_ms=)\S+|(?<= duration_ms=)\S+|(?<=://127.0.0.1:)\d+")


class Client:
    """One connection of a client that reads when it is told to."""

    def __init__(self, port: int, read_bytes: int | None = None) -> None:
        """`read_bytes`: what its kernel may hold for it."""
        self.socket = socket.socket()
        if read_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read_bytes)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.heard = b""
        """All of it."""

    def ask(self, ident: bytes = b"r1", version: bytes = b"1.1") -> None:
        self.socket.send(
            b"POST /v1/chat/completions HTTP/%b\r\nHost: x\r\nX-Request-Id: %b\r\nContent-Length: %d\r\n\r\n%b"
            % (version, ident, len(BODY), BODY)
        )

    async def hears(self, end: bytes, behind: int = 0) -> None:
        """Reads until the body, behind so many bytes, ends so."""
        while not self.body[behind:].endswith(end):
            await self._read()

    async def hears_the_end(self) -> None:
        """Of the answer, or of the connection."""
        with contextlib.suppress(EOFError):
            while not self.body.endswith(END):
                await self._read()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            part = await asyncio.wait_for(loop.sock_recv(self.socket, 1 << 20), PATIENCE_S)
        except ConnectionResetError:
            part = b""
        if not part:
            raise EOFError(self.heard[-100:])
        self.heard += part

    @property
    def body(self) -> bytes:
        """As far as it has been heard, out of its chunks. (Of several answers, one behind the other.)"""
        _, _, rest = self.heard.partition(b"\r\n\r\n")
        found = []
        while rest:
            line, _, rest = rest.partition(b"\r\n")
            size = int(line, 16)
            if size:
                found.append(rest[:size])
                rest = rest[size + 2 :]
            else:
                found.append(END)
                _, _, rest = rest.partition(b"\r\n\r\n")
        return b"".join(found)

    def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.socket.close()


class Stage:
    """A frontend with one engine."""

    def __init__(self, kind: Kind, frontend: Frontend, went: list[Conduit]) -> None:
        """On a running loop."""
        self.kind = kind
        self.frontend = frontend
        self.went = went
        """The conduits that there have been."""
        self.clients: list[Client] = []
        loop = asyncio.get_running_loop()
        config = frontend.config
        self.outbox = Outbox(loop)
        self.http = HttpUpstream(config, self.outbox)
        self.native = ZmqUpstream(config, self.outbox)
        self.forwarder = Forwarder(config, frontend.dispatcher, frontend.counters, self.http, self.native, loop)
        self.inference = Inference(config, self.forwarder)
        self.state = ServerState()
        self.engine: Any
        self.slot = 0
        self.port = 0
        self._idle = IdleConnections(loop, 75.0)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._servers: list[asyncio.Server] = []

    async def open(self) -> None:
        self.engine = await (HttpEngine.open() if self.kind == "http" else ZmqEngine.open(self._context))
        known = msgspec.structs.replace(self.engine.instance, models=("tiny",), role=Role.MIXED)
        self.slot = self.frontend.run.writer.admit(known, self.frontend.run.clock())
        self.port = await self.listen()

    async def listen(self, tls: ssl.SSLContext | None = None, send_bytes: int = 0) -> int:
        """At another port, whose number is returned. `send_bytes`: what the kernel may hold for a client; 0: any."""
        config = uvicorn.Config(self.inference, ws="none", lifespan="off", log_config=None, access_log=False)  # type: ignore[arg-type]  # uvicorn's word for the same
        lean = Lean(self.inference, self.state)
        listener = socket.create_server(("127.0.0.1", 0))
        if send_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(
                config,
                self.state,
                {},
                self.frontend.counters,
                self._idle,
                lean,
                self.inference.bound,
                self.outbox,
            ),
            sock=listener,
            ssl=tls,
        )
        self._servers.append(server)
        return int(listener.getsockname()[1])

    def client(self, read_bytes: int | None = None) -> Client:
        client = Client(self.port, read_bytes)
        self.clients.append(client)
        return client

    async def stream(self, client: Client, ident: bytes = b"r1") -> Any:
        """Begins one; what the engine says from here on goes the short way, if there is one."""
        client.ask(ident)
        asked = await self.engine.asked()
        for number in range(2):
            asked.chunk(b"data: %d\n\n" % number)
            await client.hears(b"data: %d\n\n" % number)
        assert self.flowing or conduit.compiled is None
        return asked

    async def streams(self, count: int) -> list[tuple[Client, Any]]:
        """So many, each with a client of its own."""
        begun = []
        for number in range(count):
            client = self.client()
            begun.append((client, await self.stream(client, b"r%d" % number)))
        return begun

    async def says(self, client: Client, asked: Any, *events: bytes) -> None:
        """The engine says these, each when its client has heard the last one."""
        for event in events:
            before = len(client.body)
            asked.chunk(event)
            await client.hears(event, before)

    async def flows_again(self, client: Client, asked: Any) -> None:
        """Some events, of which the short way takes the last ones, if there is one. (Not all: a native engine's event
        that is read together with another message of it goes the long way.)"""
        await self.says(client, asked, b"data: a\n\n", b"data: b\n\n")
        before = self.passed
        await self.says(client, asked, b"data: c\n\n", b"data: d\n\n", b"data: e\n\n")
        assert self.passed > before or conduit.compiled is None

    # -- what there is to see --------------------------------------------------------------------------------

    @property
    def unsent(self) -> int:
        """Bytes that wait in the transport of the only client."""
        (connection,) = self.state.connections
        return int(connection.transport.get_write_buffer_size())

    @property
    def is_paused(self) -> bool:
        """The only request is, by its client."""
        (forward,) = self.forwarder.live
        return forward._paused

    @property
    def flowing(self) -> int:
        """Streams that go the short way now."""
        if self.kind == "http":
            intake = self.http._intake._intake
            return 0 if intake is None else len(intake)
        return sum(call._conduit is not None for call in self.native._calls.values())

    @property
    def passed(self) -> int:
        """Events that have gone it."""
        return sum(conduit.events for conduit in self.went)

    @property
    def counts(self) -> dict[str, int]:
        """All of the frontend's counters that are not zero, but those of times."""
        counters = self.frontend.counters
        found = {column.name: int(counters.totals[column]) for column in TotalColumn}
        found |= {column.name: counters.load(column, self.slot) for column in CounterColumn}
        return {name: count for name, count in found.items() if count}

    async def close(self) -> None:
        """Everything ends, and nothing of it is left."""
        for client in self.clients:
            client.close()
        await eventually(lambda: not self.state.connections, "the clients' connections have ended")
        await eventually(lambda: not self.forwarder.live, "the requests have ended")
        assert self.flowing == 0
        assert not self.native._calls
        assert self.frontend.run.reader.counters.in_flight(self.slot)[0] == 0

    def clear(self) -> None:
        """However it went."""
        for client in self.clients:
            client.close()
        self.http.close()
        self.native.close()
        self.engine.close()
        self._context.term()
        for server in self._servers:
            server.close()
        self._idle.close()


async def turns() -> None:
    """Of the loop: what has been sent through sockets is read."""
    for _ in range(10):
        await asyncio.sleep(0)


Scene = Callable[[Stage], Awaitable[object]]
"""What it returns is compared, too."""


@dataclass
class Seen:
    """What a scene came to."""

    heard: list[bytes]
    bodies: list[bytes]
    lines: list[str]
    """Of the log, sorted."""
    counts: dict[str, int]
    noted: object
    """What the scene returned."""
    passed: int
    """Events that went the short way."""


class Player:
    """Plays scenes, each with a frontend of its own; none leaves a descriptor open."""

    def __init__(
        self, path: Path, loop: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._path = path
        self._loop = loop
        self._caplog = caplog
        self._monkeypatch = monkeypatch
        self._played = 0
        caplog.set_level("INFO", "penstock.access")

    def both(self, kind: Kind, scene: Scene, *, alike: Literal["heard", "bodies"] = "bodies", **sections: Any) -> Seen:
        """Plays it with the short way and without; it comes to the same. `alike`: whether clients get the same chunks,
        or only the same in them. Returns what it came to with the short way, which something of it has gone."""
        long, short = self.play(kind, scene, short=False, **sections), self.play(kind, scene, **sections)
        assert getattr(short, alike) == getattr(long, alike)
        assert short.lines == long.lines
        assert short.counts == long.counts
        assert short.noted == long.noted
        assert long.passed == 0
        assert short.passed > 0
        return short

    def play(self, kind: Kind, scene: Scene, *, short: bool = True, **sections: Any) -> Seen:
        self._played += 1
        self._caplog.clear()
        path = self._path / str(self._played)
        path.mkdir()
        before = _descriptors()
        with self._monkeypatch.context() as patch, Frontend(path, **sections) as frontend:
            went: list[Conduit] = []
            patch.setattr(conduit, "compiled", _noting(went) if short else None)
            with asyncio.Runner(loop_factory=LOOPS[self._loop]) as runner:
                seen = runner.run(self._run(kind, frontend, went, scene))
        assert _descriptors() == before
        return seen

    async def _run(self, kind: Kind, frontend: Frontend, went: list[Conduit], scene: Scene) -> Seen:
        stage = Stage(kind, frontend, went)
        await stage.open()
        try:
            noted = await scene(stage)
            await stage.close()
            counts = stage.counts
        finally:
            stage.clear()
        heard = [client.heard for client in stage.clients]
        lines = sorted(_VARYING.sub("-", record.getMessage()) for record in self._caplog.records)
        return Seen(heard, [client.body for client in stage.clients], lines, counts, noted, stage.passed)


def _noting(went: list[Conduit]) -> ModuleType:
    """The short way itself, but that it notes whom it makes."""
    real = conduit.compiled
    assert real is not None

    def made(client: int) -> Conduit:
        went.append(real.Conduit(client))
        return went[-1]

    noting = ModuleType("noting")
    vars(noting).update(vars(real), Conduit=made)
    return noting


def _descriptors() -> int:
    """Sockets and epolls that are open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found += os.readlink(f"/proc/self/fd/{name}").startswith(("socket:", "anon_inode:[eventpoll]"))
    return found
