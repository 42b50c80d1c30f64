"""Events of many streams in turn, by the short way (frontend/conduit.py) and by the long one: what lies between an
engine's bytes and its clients' sockets.

In each round every stream's engine says one event, and the loop turns until all clients have theirs; that is timed.
Everything in between is the product's own (tests/frontend/flowing.py puts it together). Both ways take turns, and what
a bare `recv` and `send` of the same bytes take is measured beside them; a native engine's step comes without a `recv`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Coroutine, Iterator
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
    """A frontend whose streams all flow, or none of them. It has a loop of its own, as the switch is the process's."""

    def __init__(self, kind: Kind, frontend: Frontend, compiled: ModuleType | None) -> None:
        self._compiled = compiled
        self._loop = uvloop.new_event_loop()
        self._streams: list[tuple[Client, Any]] = []
        self._said = b""
        self.stage: Stage
        self._run(self._open(kind, frontend))

    def say(self) -> None:
        """One event of each: in a step of its engine, or as a chunk on each connection."""
        if self.stage.kind == "http":
            for _, asked in self._streams:
                os.write(asked.transport.get_extra_info("socket").fileno(), CHUNK)
            return
        deltas = [asked.delta(wire.CHUNK, EVENT) for _, asked in self._streams]
        step = wire.encode([wire.STEP_TAG, self.stage.engine.incarnation, deltas])
        self._said = head(len(step)) + step

    def pass_on(self) -> None:
        self._run(self._pass_on())

    def read(self) -> None:
        for client, _ in self._streams:
            assert client.socket.recv(1 << 16) == CHUNK

    def close(self) -> None:
        self._run(self._close())
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        conduit.compiled = self._compiled
        self._loop.run_until_complete(work)

    async def _open(self, kind: Kind, frontend: Frontend) -> None:
        self.stage = Stage(kind, frontend, [])
        await self.stage.open()
        for _ in range(STREAMS):
            client = self.stage.client()
            self._streams.append((client, await self.stage.stream(client)))
        assert self.stage.flowing == (STREAMS if self._compiled is not None else 0)

    async def _pass_on(self) -> None:
        if self.stage.kind == "native":
            (peer,) = self.stage.native._peers._by_url.values()
            peer.data_received(self._said)
        await turns()

    async def _close(self) -> None:
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
def compiled() -> Iterator[ModuleType | None]:
    """On one core: those who wake each other are this process."""
    cores, compiled = os.sched_getaffinity(0), conduit.compiled
    os.sched_setaffinity(0, {max(cores)})
    yield compiled
    os.sched_setaffinity(0, cores)
    conduit.compiled = compiled


@pytest.mark.parametrize("kind", KINDS)
def test_an_event_of_many_streams(
    benchmark: BenchmarkFixture, compiled: ModuleType, tmp_path: Path, kind: Kind
) -> None:
    with ExitStack() as stack:
        ways: dict[str, Way | Bare] = {}
        for name, module in (("long", None), ("short", compiled)):
            (tmp_path / name).mkdir()
            ways[name] = way = Way(kind, stack.enter_context(Frontend(tmp_path / name)), module)
            stack.callback(way.close)
        ways["bare"] = Bare(stack)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, it in ways.items():
                it.say()
                began = time.thread_time()
                it.pass_on()
                taken[name].append(1e6 * (time.thread_time() - began) / STREAMS)
                it.read()
        assert way.stage.flowing == STREAMS
        benchmark.pedantic(way.pass_on, setup=way.say, teardown=way.read, rounds=50)
    us = {name: median(found) for name, found in taken.items()}
    benchmark.extra_info["us an event"] = ", ".join(f"{name} {found:.2f}" for name, found in us.items())
    benchmark.extra_info["of the long way's"] = round(us["short"] / us["long"], 2)
    benchmark.extra_info["over the compiled request path"] = is_compiled()
