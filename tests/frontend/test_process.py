"""A frontend as a process: accepting on a shared socket, leaving clients, and every way to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from broker import config
from broker.config import Server
from broker.counters import TotalColumn
from shm.segment import Segment
from tests.support.client import Client, Exchange, State, chat
from tests.support.table import Run
from tests.support.waiting import PATIENCE_S, eventually

FLOOD = 96 * 1024 * 1024
LONG_NS = 3_600_000_000_000
ROOT = Path(__file__).parents[2]


class Engine:
    """An HTTP engine that streams one event, and then waits for the test."""

    def __init__(self) -> None:
        self.connections: set[asyncio.StreamWriter] = set()
        self.streams: list[asyncio.StreamWriter] = []
        self.flooded = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
                if b'"flood"' in body:
                    await self.flood(writer)
                elif b'"hold"' in body:
                    self.streams.append(writer)
                elif b'"stream": true' in body:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
                    writer.write(b"transfer-encoding: chunked\r\n\r\na\r\ndata: {}\n\n\r\n")
                    self.streams.append(writer)
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()
        self.connections.remove(writer)

    async def flood(self, writer: asyncio.StreamWriter) -> None:
        """Sends as fast as it is let, FLOOD bytes in all."""
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % FLOOD)
        while self.flooded < FLOOD:
            writer.write(b"x" * 65536)
            await writer.drain()
            self.flooded += 65536

    def finish(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


class House:
    """Segments, a listening socket, an engine, and the frontends that a test starts."""

    def __init__(self, path: Path, drain_secs: float, lean: bool) -> None:
        self.run = Run(path, slots=4, frontends=4)
        settings = msgspec.structs.replace(self.run.config, server=Server(drain_secs=drain_secs, lean_path=lean))
        (path / "config.json").write_bytes(config.dump(settings))
        self.run.writer.mark_ready()
        self.run.writer.beat(time.monotonic_ns() + LONG_NS)
        self.path = path
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.listener.setblocking(False)
        self.port: int = self.listener.getsockname()[1]
        self.client = Client(self.port)
        self.engine = Engine()
        self.alive, self.alive_end = os.pipe()
        self.processes: list[subprocess.Popen[bytes]] = []

    async def frontend(self, module: str = "frontend") -> subprocess.Popen[bytes]:
        """Starts one more and waits until it accepts. `module`: another one than the product's."""
        index = len(self.processes)
        self.run.roster.enter(index)
        ready, theirs = os.pipe()
        listen = self.listener.fileno()
        arguments = ["--index", str(index), "--life", "1", "--listen-fd", str(listen)]
        arguments += ["--ready-fd", str(theirs), "--alive-fd", str(self.alive)]
        process = await asyncio.to_thread(
            subprocess.Popen,
            [sys.executable, "-m", module, str(self.path), *arguments],
            pass_fds=(listen, theirs, self.alive),
            cwd=ROOT,
        )
        self.processes.append(process)
        os.close(theirs)
        with os.fdopen(ready, "rb") as pipe:
            assert await asyncio.to_thread(pipe.read) == b"ready\n"
        return process

    async def stream(self, count: int = 1, **fields: object) -> list[Exchange]:
        """Streams whose first event has arrived."""
        exchanges = [await self.client.send("/v1/chat/completions", chat(**fields)) for _ in range(count)]
        for exchange in exchanges:
            await asyncio.wait_for(exchange.first_byte, PATIENCE_S)
            assert exchange.status == 200, exchange
        return exchanges

    def connections(self) -> list[int]:
        """Open ones, by frontend."""
        with Segment.attach(self.path / "counters") as segment:
            totals = segment.array("totals")[: len(self.processes)]
            opened = totals[:, TotalColumn.CONNECTIONS_OPENED] - totals[:, TotalColumn.CONNECTIONS_CLOSED]
            found: list[int] = opened.tolist()
            return found

    def in_flight(self) -> int:
        return self.run.reader.counters.in_flight(0)[0]

    async def exit_code(self, process: subprocess.Popen[bytes]) -> int:
        return await asyncio.to_thread(process.wait, PATIENCE_S)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        self.listener.close()
        os.close(self.alive)
        if self.alive_end >= 0:
            os.close(self.alive_end)
        self.run.__exit__()


def in_house(
    path: Path, test: Callable[[House], Awaitable[None]], drain_secs: float = 60.0, *, lean: bool = True
) -> None:
    async def run() -> None:
        house = House(path, drain_secs, lean)
        server = await asyncio.start_server(house.engine, "127.0.0.1", 0)
        house.run.admit(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            with house.client:
                await test(house)
        finally:
            house.close()
            server.close()
            await eventually(lambda: not house.engine.connections, "the engine's connections ended")

    asyncio.run(run())


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
def test_a_client_that_leaves_is_seen_at_once_before_and_after_the_first_byte(tmp_path: Path, lean: bool) -> None:
    async def test(house: House) -> None:
        await house.frontend()
        waiting = await house.client.send("/v1/chat/completions", chat(hold=1))
        (streaming,) = await house.stream()
        await eventually(lambda: len(house.engine.streams) == 2, "both requests at the engine")
        assert house.in_flight() == 2
        for exchange in (waiting, streaming):
            exchange.leave()
        await eventually(lambda: not house.engine.connections, "both connections to the engine ended")
        await eventually(lambda: house.in_flight() == 0, "both leases closed")

    in_house(tmp_path, test, lean=lean)


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
def test_a_client_that_does_not_read_stops_its_engine_and_gets_every_byte_later(tmp_path: Path, lean: bool) -> None:
    async def test(house: House) -> None:
        process = await house.frontend()
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port, limit=65536)
        writer.write(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 11\r\n\r\n{"flood":1}')
        seen = [-1] * 25  # half a second of looking

        def stuck() -> bool:
            seen.append(house.engine.flooded)
            return house.engine.flooded > 0 and len(set(seen[-25:])) == 1

        await eventually(stuck, "the engine stands")
        # What is on the way lies in the buffers of four sockets (the system lets each grow to 6 MiB at most) and,
        # bounded, in the frontend.
        assert house.engine.flooded < FLOOD / 2
        assert psutil.Process(process.pid).memory_info().rss < 128 * 1024 * 1024
        await reader.readuntil(b"\r\n\r\n")
        left = FLOOD
        while left:
            left -= len(await reader.read(1 << 20))
        writer.close()

    in_house(tmp_path, test, lean=lean)


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
def test_sigterm_lets_running_streams_end_and_serves_what_is_in_the_backlog(tmp_path: Path, lean: bool) -> None:
    async def test(house: House) -> None:
        process = await house.frontend()
        (running,) = await house.stream()
        fresh = await asyncio.open_connection("127.0.0.1", house.port)
        await eventually(lambda: house.connections() == [2], "two connections")
        # Stopped, it takes nothing: these connections and their requests lie in the backlog when SIGTERM comes.
        process.send_signal(signal.SIGSTOP)
        late = [await house.client.send("/v1/chat/completions", chat(stream=False)) for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        # Neither is the one that was taken before and has not asked anything yet.
        fresh[1].write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await asyncio.wait_for(fresh[0].readline(), PATIENCE_S)) == b"HTTP/1.1 200 OK\r\n"
        fresh[1].close()
        for exchange in late:
            assert await asyncio.wait_for(exchange.ended, PATIENCE_S) is State.FINISHED
        assert process.poll() is None
        house.engine.finish(house.engine.streams[0])
        assert await asyncio.wait_for(running.ended, PATIENCE_S) is State.FINISHED
        assert running.events() == ["{}", "[DONE]"]
        assert await house.exit_code(process) == 0
        assert house.connections() == [0]

    in_house(tmp_path, test, lean=lean)


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
def test_streams_that_outlast_the_limit_end_with_an_error_and_the_exit_is_orderly(tmp_path: Path, lean: bool) -> None:
    async def test(house: House) -> None:
        process = await house.frontend()
        (running,) = await house.stream()
        waiting = await house.client.send("/v1/chat/completions", chat(hold=1))
        await eventually(lambda: house.in_flight() == 2, "both under way")
        process.terminate()
        assert await house.exit_code(process) == 0
        for exchange in (running, waiting):
            assert await asyncio.wait_for(exchange.ended, PATIENCE_S) is State.FINISHED
            error = exchange.error()
            assert error is not None
            assert error["code"] == "stopping"
        assert (running.status, waiting.status) == (200, 503)
        assert house.in_flight() == 0

    in_house(tmp_path, test, drain_secs=0.5, lean=lean)


def test_ctrl_c_is_left_to_the_supervisor(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        process = await house.frontend()
        process.send_signal(signal.SIGINT)
        exchange = await house.client.ask("/health")
        assert exchange.status == 200
        process.terminate()
        assert await house.exit_code(process) == 0

    in_house(tmp_path, test)


def test_the_end_of_the_supervisor_is_a_graceful_stop(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        process = await house.frontend()
        (running,) = await house.stream()
        os.close(house.alive_end)
        house.alive_end = -1
        # The listening socket is ours too; that the frontend let go of it shows in nobody answering any more.
        await eventually(lambda: house.in_flight() == 1, "still serving")
        house.engine.finish(house.engine.streams[0])
        assert await asyncio.wait_for(running.ended, PATIENCE_S) is State.FINISHED
        assert await house.exit_code(process) == 0

    in_house(tmp_path, test)


def test_bursts_of_connections_are_shared_evenly(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        for _ in range(2):
            # The product waits for its neighbour for a moment only, and on a busy machine that may not be let run.
            await house.frontend("tests.support.standins.polite_frontend")
        bursts, count = 5, 60
        for _ in range(bursts):
            await house.stream(count // bursts)
        shares = house.connections()
        assert sum(shares) == count
        # The margin is 2 and an eighth of one's own; twice that is left for connections that are not counted yet.
        assert abs(shares[0] - shares[1]) <= 2 * (2 + count / 2 / 8), shares

    in_house(tmp_path, test)


def test_a_frontend_serves_on_when_its_even_neighbour_is_stopped(tmp_path: Path) -> None:
    async def test(house: House) -> None:
        first = await house.frontend()
        second = await house.frontend()
        second.send_signal(signal.SIGSTOP)
        await house.stream(80)
        assert house.connections() == [80, 0]
        assert first.poll() is None
        second.send_signal(signal.SIGCONT)

    in_house(tmp_path, test)


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "plain"])
def test_requests_sent_ahead_are_answered_in_order_while_the_process_stops(tmp_path: Path, lean: bool) -> None:
    async def test(house: House) -> None:
        process = await house.frontend()
        reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
        inference = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
        stream = b'{"stream": true}'
        writer.write(inference % (len(stream), stream))
        assert (await asyncio.wait_for(reader.readuntil(b"data: {}"), PATIENCE_S)).startswith(b"HTTP/1.1 200 OK\r\n")
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + inference % (2, b"{}"))
        await house.client.ask("/health")  # by now those two have been read as well
        process.terminate()
        house.engine.finish(house.engine.streams[0])
        rest = await asyncio.wait_for(reader.read(), PATIENCE_S)
        places = [rest.index(word) for word in (b"[DONE]", b"0\r\n\r\n", b'{"status":"ok"}', b"\r\n\r\n{}")]
        assert places == sorted(places)
        assert await house.exit_code(process) == 0
        writer.close()

    in_house(tmp_path, test, lean=lean)
