"""Events of many streams in turn, by the short way (frontend/conduit.py) and by the long one: what lies between an
engine's bytes and its clients' sockets.

In each round every stream's engine says one event, and the loop turns until all clients have theirs; that is timed.
Everything in between is the product's own (tests/frontend/flowing.py puts it together). Both ways have their streams on
one loop and take turns, and what a bare `recv` and `send` of the same bytes take is measured beside them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest
import uvloop
from pytest_benchmark.fixture import BenchmarkFixture

from broker import wire
from broker.banner import is_compiled
from broker.zmtp import head
from frontend import conduit
from tests.frontend.conduits import framed
from tests.frontend.fakes import Frontend
from tests.frontend.flowing import KINDS, Client, Kind, Stage, turns

STREAMS = 100
"""Of each way; two sockets each, or four, of the 1024 descriptors that many shells allow."""
ROUNDS = 150
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
CHUNK = framed(EVENT)

pytestmark = pytest.mark.skipif(conduit.compiled is None, reason="it was not compiled here")


class Way:
    """A frontend whose streams all flow, or none of them."""

    def __init__(self, kind: Kind, frontend: Frontend, compiled: ModuleType | None) -> None:
        """On a running loop."""
        self._compiled = compiled
        conduit.compiled = compiled
        self.stage = Stage(kind, frontend, [])
        self._streams: list[tuple[Client, Any]] = []

    async def open(self) -> None:
        await self.stage.open()
        for _ in range(STREAMS):
            client = self.stage.client()
            self._streams.append((client, await self.stage.stream(client)))
        assert self.stage.flowing == (STREAMS if self._compiled is not None else 0)

    def say(self) -> None:
        """One event of each: in a step of its engine, or as a chunk on each connection."""
        conduit.compiled = self._compiled
        if self.stage.kind == "http":
            for _, asked in self._streams:
                os.write(asked.transport.get_extra_info("socket").fileno(), CHUNK)
            return
        deltas = [asked.delta(wire.CHUNK, EVENT) for _, asked in self._streams]
        step = wire.encode([wire.STEP_TAG, self.stage.engine.incarnation, deltas])
        self._said = head(len(step)) + step

    async def pass_on(self) -> None:
        if self.stage.kind == "native":
            (peer,) = self.stage.native._peers._by_url.values()
            peer.data_received(self._said)
        await turns()

    def read(self) -> None:
        for client, _ in self._streams:
            assert client.socket.recv(1 << 16) == CHUNK

    async def close(self) -> None:
        await self.stage.close()
        self.stage.clear()
        await turns()


class Bare:
    """As many pairs of connections, and nothing in between."""

    def __init__(self, stack: ExitStack) -> None:
        self._pairs = [self._connect(stack) + self._connect(stack) for _ in range(STREAMS)]

    def _connect(self, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            one = stack.enter_context(socket.create_connection(listener.getsockname()))
            return one, stack.enter_context(listener.accept()[0])

    def say(self) -> None:
        for engine, *_ in self._pairs:
            engine.send(CHUNK)

    def pass_on(self) -> None:
        for _, ours, to_client, _ in self._pairs:
            to_client.send(ours.recv(1 << 16))

    def read(self) -> None:
        for *_, client in self._pairs:
            assert client.recv(1 << 16) == CHUNK


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """On one core: those who wake each other are this process."""
    cores, compiled = os.sched_getaffinity(0), conduit.compiled
    os.sched_setaffinity(0, {max(cores)})
    loop = uvloop.new_event_loop()
    yield loop
    loop.close()
    os.sched_setaffinity(0, cores)
    conduit.compiled = compiled


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_of_many_streams(
    benchmark: BenchmarkFixture, loop: asyncio.AbstractEventLoop, tmp_path: Path, kind: Kind
) -> None:
    compiled = conduit.compiled

    async def make(name: str, module: ModuleType | None, frontend: Frontend) -> Way:
        way = Way(kind, frontend, module)
        await way.open()
        return way

    taken: dict[str, list[float]] = {"long": [], "short": [], "bare": []}

    def time_of(name: str, pass_on: Callable[[], object]) -> None:
        began = time.thread_time()
        pass_on()
        taken[name].append(1e6 * (time.thread_time() - began) / STREAMS)

    with ExitStack() as stack:
        ways = {}
        for name, module in (("long", None), ("short", compiled)):
            (tmp_path / name).mkdir()
            frontend = stack.enter_context(Frontend(tmp_path / name))
            ways[name] = loop.run_until_complete(make(name, module, frontend))
            stack.callback(lambda way=ways[name]: loop.run_until_complete(way.close()))
        bare = Bare(stack)
        for _ in range(ROUNDS):
            for name, way in ways.items():
                way.say()
                time_of(name, lambda way=way: loop.run_until_complete(way.pass_on()))
                way.read()
            bare.say()
            time_of("bare", bare.pass_on)
            bare.read()
        short = ways["short"]
        assert short.stage.flowing == STREAMS
        benchmark.pedantic(
            lambda: loop.run_until_complete(short.pass_on()),
            setup=short.say,
            teardown=short.read,
            rounds=50,
        )
    us = {name: median(found) for name, found in taken.items()}
    benchmark.extra_info["us an event"] = ", ".join(f"{name} {found:.2f}" for name, found in us.items())
    benchmark.extra_info["of the long way's"] = round(us["short"] / us["long"], 2)
    benchmark.extra_info["over the compiled request path"] = is_compiled()
