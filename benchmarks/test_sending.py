"""A write past the transport beside one through it: what lies between `write` and the system call.

Both go to the same sockets in turn, and what a bare `send` of the same bytes takes is measured beside them.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from statistics import median

import pytest
import uvloop
from pytest_benchmark.fixture import BenchmarkFixture

from frontend import sending
from frontend.outbox import MOST, Outbox, Outlet

EVENT = b"x" * 200
ROUNDS = 200

pytestmark = pytest.mark.skipif(sending.send is None, reason="it was not compiled here")


class Clients:
    """As many connections as are written to in one burst, and the outlets of both kinds to them."""

    def __init__(self) -> None:
        self._others: list[socket.socket] = []
        self._transports: list[asyncio.Transport] = []
        self.outbox = Outbox(asyncio.get_running_loop())
        self.ways: dict[str, list[Outlet]] = {"transport": [], "socket": []}

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for _ in range(MOST - 1):  # the last one would flush by itself
                self._others.append(socket.create_connection(listener.getsockname()))
                ours, _ = listener.accept()
                ours.setblocking(False)
                transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, ours)
                self._transports.append(transport)
                for way, outlets in self.ways.items():
                    outlets.append(Outlet(transport, self.outbox))
                    if way == "transport":
                        outlets[-1]._socket = sending.NONE

    def burst(self, outlets: list[Outlet]) -> None:
        for outlet in outlets:
            outlet.write(EVENT)
        self.outbox.flush()

    def bare(self, _: list[Outlet]) -> None:
        assert sending.send is not None
        for transport in self._transports:
            sending.send(transport.get_extra_info("socket").fileno(), EVENT)

    def read(self) -> None:
        for other in self._others:
            assert other.recv(1 << 16) == EVENT

    def close(self) -> None:
        for transport in self._transports:
            transport.abort()
        for other in self._others:
            other.close()

    def time(self, write: Callable[[list[Outlet]], None], outlets: list[Outlet]) -> float:
        """us of CPU a write."""
        began = time.process_time()
        write(outlets)
        taken = time.process_time() - began
        self.read()
        return 1e6 * taken / len(self._transports)


def test_a_burst(benchmark: BenchmarkFixture) -> None:
    async def measure() -> dict[str, float]:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # what reads is this process, too
        clients = Clients()
        await clients.connect()
        taken: dict[str, list[float]] = {"transport": [], "socket": [], "bare": []}
        for _ in range(ROUNDS):
            for way, outlets in clients.ways.items():
                taken[way].append(clients.time(clients.burst, outlets))
            taken["bare"].append(clients.time(clients.bare, []))
        benchmark.pedantic(clients.burst, (clients.ways["socket"],), teardown=lambda _: clients.read(), rounds=50)
        clients.close()
        return {way: median(figures) for way, figures in taken.items()}

    cores = os.sched_getaffinity(0)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(measure())
    finally:
        os.sched_setaffinity(0, cores)
    benchmark.extra_info["us a write"] = ", ".join(f"{way} {us:.2f}" for way, us in found.items())
    benchmark.extra_info["of the transport's"] = round(found["socket"] / found["transport"], 2)
