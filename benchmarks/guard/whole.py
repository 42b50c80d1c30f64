"""A frontend without sockets: what a client sends comes in as bytes, and what engine and client get goes out as bytes.

Everything in between is the product, put together as `frontend.app` does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import uvicorn
import uvloop
from uvicorn.server import ServerState

from broker import batched, wire
from broker.policies import need_index
from broker.prefix import PrefixIndex, PrefixWriter, create_prefix, run_layout
from broker.types import EngineKind, Instance, Role
from broker.zmtp import GREETING, head, ready
from frontend.admission import Admission
from frontend.api import Inference
from frontend.breaker import Breaker
from frontend.connection import Connection
from frontend.dispatch import Dispatcher, make_policies
from frontend.forwarder import Forwarder
from frontend.idle import IdleConnections
from frontend.lean import Lean
from frontend.outbox import Outbox, Outlet
from frontend.sending import NONE, descriptor
from frontend.upstream.http import HttpUpstream
from frontend.upstream.http_connection import Connection as EngineConnection
from frontend.upstream.http_pool import Pool
from frontend.upstream.zmq import ZmqUpstream
from frontend.upstream.zmq_peers import Peer
from tests.support.table import Run

INSTANCES = 4
INCARNATION = bytes(range(16, 32))
TEXT = b"some words " * 85
STREAMED = b'{"model":"tiny","messages":[{"role":"user","content":"%s"}],"stream":true}' % TEXT
WHOLE = b'{"model":"tiny","messages":[{"role":"user","content":"%s"}]}' % TEXT
LONG = b'{"model":"tiny","messages":[{"role":"user","content":"%s"}]}' % (TEXT * 35)
"""32 KiB of prompt."""


def request(body: bytes) -> bytes:
    """As `tools/loadgen.c` sends it."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:8000\r\nContent-Type: application/json\r\n"
        b"Accept: */*\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )


ANSWER_BODY = b'{"id":"1","choices":[{"message":{"content":"%s"}}],"usage":{"completion_tokens":64}}' % (b"token " * 64)
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
    len(ANSWER_BODY),
    ANSWER_BODY,
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)
_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
EVENT = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
STREAM_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Transport:
    """A network that takes everything at once; `sent` is what was written since it was looked at."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.write = self.sent.append

        self.protocol: Any = None
        self.is_closing: Callable[[], bool] = bool  # asked for every write: as a real one's, it costs no bytecode

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> Any:
        return {"sockname": ("127.0.0.1", 80), "peername": ("127.0.0.1", 1)}.get(name)

    def set_write_buffer_limits(self, high: int) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


class Lent(Transport):
    """One with a socket, for the short way (frontend/conduit.py): what goes that way comes out at `other`."""

    def __init__(self) -> None:
        super().__init__()
        self._socket, self.other = socket.socketpair()
        self.other.setblocking(False)

    def get_extra_info(self, name: str) -> Any:
        return self._socket if name == "socket" else super().get_extra_info(name)

    def end(self) -> None:
        self._socket.close()
        self.other.close()


class Turns:
    """In the place of a loop, as the native transport uses one; the guard says when a turn is made."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.time = loop.time
        self.call_later = loop.call_later
        self._due: list[Callable[[], object]] = []
        self.call_soon = self._due.append

    def run(self) -> None:
        while self._due:
            self._due.pop()()


class Whole:
    """One frontend, one client's connection, and one kept connection to each of its engines."""

    def __init__(self, path: Path, policy: str, *, native: bool, flows: bool = False) -> None:
        """On a running loop. `native`: the engines are. `flows`: streams go the short way, if there is one."""
        self._flows = flows
        self._lent: list[Lent] = []
        self.loop = loop = asyncio.get_running_loop()
        self.run = Run(path, slots=64, frontends=4)
        scheduler = msgspec.structs.replace(self.run.config.scheduler, policy=policy)
        config = msgspec.structs.replace(self.run.config, scheduler=scheduler)
        urls = [f"http://10.0.0.{i}:8000" for i in range(INSTANCES)]
        instances = [Instance(url=url, models=("tiny",), role=Role.MIXED, engine=EngineKind.OPENAI) for url in urls]
        if native:
            kind, name = EngineKind.NATIVE, INCARNATION
            instances = [
                msgspec.structs.replace(i, url="tcp" + i.url[4:], engine=kind, incarnation=name) for i in instances
            ]
        for instance in instances:
            self.run.writer.admit(instance, self.run.clock())
        self.counters = self.run.frontend(0)
        breaker = Breaker(config.upstream.breaker_failures, config.upstream.breaker_secs)
        self._prefixes: tuple[PrefixIndex, PrefixWriter] | None = None
        if need_index(config):
            create_prefix(path, run_layout(config))
            writer = PrefixWriter.attach(path, run_layout(config), dict.fromkeys(range(config.shm.slots), 1))
            self._prefixes = PrefixIndex.of_run(path, config, 0), writer
        prefixes = self._prefixes[0] if self._prefixes is not None else None
        dispatcher = Dispatcher(self.run.reader, self.counters, make_policies(config, 0, prefixes), breaker)
        admission = Admission(config, self.run.reader, dispatcher, self.counters, 1, loop, lambda _: True)

        self._turns = Turns(loop)
        self._outbox = outbox = Outbox(cast("asyncio.AbstractEventLoop", self._turns))
        self.http = HttpUpstream(config, outbox)
        self.native = ZmqUpstream(config, outbox)
        self.native._loop = cast("asyncio.AbstractEventLoop", self._turns)
        self.forwarder = Forwarder(config, admission, self.counters, self.http, self.native, loop, time.monotonic)
        inference = Inference(config, self.forwarder)
        self.engines: list[tuple[EngineConnection | Peer, Transport]] = []
        for instance in instances:
            if native:
                self._connect_native(instance)
            else:
                self._connect_engine(instance.url)
        self.state = ServerState()
        self.state.default_headers = [(b"date", b"Sun, 22 Nov 2026 08:00:00 GMT")]
        self._uvicorn = uvicorn.Config(
            cast("Any", inference), ws="none", lifespan="off", log_config=None, access_log=False
        )
        self._uvicorn.load()
        self.idle = IdleConnections(loop, 75.0)
        self._lean = Lean(inference, self.state)
        self.join()

    def join(self) -> None:
        """A client connects, one more or the first; it is the one that asks from now on."""
        self.client = self._transport()
        self.connection = Connection(
            self._uvicorn, self.state, {}, self.counters, self.idle, self._lean, outbox=self._outbox
        )
        self.connection.connection_made(cast("asyncio.Transport", self.client))

    def _transport(self) -> Transport:
        if not self._flows:
            return Transport()
        self._lent.append(Lent())
        return self._lent[-1]

    def _connect_engine(self, url: str) -> None:
        pool = self.http._pools.setdefault(
            url, Pool(url, 4096, self.loop, outbox=self._outbox, intake=self.http._intake)
        )
        connection = EngineConnection(pool, cast("Any", None), self.loop)
        pool._connections.add(connection)
        transport = self._transport()
        connection._socket = descriptor(cast("asyncio.Transport", transport))
        connection._transport = cast("asyncio.Transport", transport)
        connection._outlet = outlet = Outlet(connection._transport, self._outbox)
        outlet._socket = NONE  # requests are seen in `sent`
        pool.spare(connection)
        self.engines.append((connection, transport))

    def _connect_native(self, instance: Instance) -> None:
        peer = self.native._peers.at(instance)
        assert peer._connecting is not None
        peer._connecting.cancel()
        transport = Transport()
        peer.connection_made(cast("asyncio.Transport", transport))
        welcome = wire.encode(wire.DataWelcome(wire.PROTOCOL, INCARNATION))
        peer.data_received(GREETING + ready(b"") + head(len(welcome)) + welcome)
        self._turns.run()
        transport.sent.clear()
        self.engines.append((peer, transport))

    def step(self, engine: EngineConnection | Peer, sequence: int, kind: int, data: bytes) -> None:
        """A native engine says something of the last request."""
        step = wire.encode([wire.STEP_TAG, INCARNATION, [[self.native._next_id, sequence, kind, data]]])
        engine.data_received(head(len(step)) + step)
        self._turns.run()

    def ask(self, data: bytes) -> EngineConnection | Peer:
        """The client sends a request; the connection to the engine that got it."""
        self.client.protocol.data_received(data)
        self._turns.run()
        for connection, transport in self.engines:
            if transport.sent:
                transport.sent.clear()
                return connection
        raise AssertionError(self.client.sent)

    @property
    def lent(self) -> Lent:
        """The client's connection, where streams flow."""
        assert isinstance(self.client, Lent)
        return self.client

    def engine_of(self, connection: EngineConnection | Peer) -> Lent:
        """Its transport, where streams flow."""
        transport = next(transport for engine, transport in self.engines if engine is connection)
        assert isinstance(transport, Lent)
        return transport

    def turn(self) -> None:
        """What is due in this turn of the loop."""
        self._turns.run()

    def deliver(self) -> None:
        """What there is to tell of prompts, to the shared index."""
        if self._prefixes is not None:
            index, writer = self._prefixes
            while notices := index.batch():
                writer.apply(notices)

    def heard(self) -> bytes:
        """By the client, until the turn of the loop has ended."""
        self._turns.run()
        data = b"".join(self.client.sent)
        self.client.sent.clear()
        return data

    def close(self) -> None:
        self.client.protocol.connection_lost(None)
        self.http.close()
        self.native.close()
        self.idle.close()
        self.run.__exit__()
        for transport in self._lent:
            transport.end()


@contextlib.contextmanager
def frontend(path: Path, policy: str = "round_robin", *, native: bool = False, flows: bool = False) -> Iterator[Whole]:
    """Lines of the log are gathered as in service; the handlers are the caller's."""

    async def made() -> Whole:
        return Whole(path, policy, native=native, flows=flows)

    loop = uvloop.new_event_loop()
    batched.start(loop)
    it = loop.run_until_complete(made())
    try:
        yield it
    finally:
        it.close()
        batched.stop()
        loop.close()
