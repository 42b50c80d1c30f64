"""One timer for the silence of all clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from frontend.idle import LOOKS, IdleConnections

LIMIT_S = 8.0


class Loop:
    """A loop whose time passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0
        self.due: list[tuple[float, Callable[[], object]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, call: Callable[[], object]) -> Loop:
        self.due.append((self.now + delay, call))
        return self

    def cancel(self) -> None:
        self.due.clear()

    def run_until(self, end: float) -> None:
        while self.due and min(self.due)[0] <= end:
            at, call = self.due.pop()
            self.now = at
            call()
        self.now = end


class Connection:
    def __init__(self) -> None:
        self.told = 0

    def idled(self) -> None:
        self.told += 1


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def idle(loop: Loop) -> IdleConnections:
    return IdleConnections(cast("asyncio.AbstractEventLoop", loop), LIMIT_S)


def test_a_silent_connection_is_told_once_soon_after_the_limit(loop: Loop, idle: IdleConnections) -> None:
    connection = Connection()
    idle.watch(connection)
    loop.run_until(100 + LIMIT_S * 0.99)
    assert (connection.told, len(idle)) == (0, 1)
    loop.run_until(100 + LIMIT_S * (1 + 1 / LOOKS))
    assert (connection.told, len(idle)) == (1, 0)
    loop.run_until(1000)
    assert connection.told == 1


def test_only_its_last_silence_counts(loop: Loop, idle: IdleConnections) -> None:
    connections = [Connection() for _ in range(3)]
    busy, heard, silent = (idle.watch(connection) for connection in connections)
    busy.end()
    busy.end()
    loop.run_until(100 + LIMIT_S / 2)
    heard.begin()
    assert len(idle) == 2
    loop.run_until(100 + LIMIT_S * 1.3)
    assert [connection.told for connection in connections] == [0, 0, 1]
    silent.begin()
    loop.run_until(100 + LIMIT_S * 1.8)
    assert [connection.told for connection in connections] == [0, 1, 1]
    loop.run_until(1000)
    assert [connection.told for connection in connections] == [0, 1, 2]


def test_who_is_gone_is_told_nothing_and_the_last_one_takes_the_timer_along(loop: Loop, idle: IdleConnections) -> None:
    connections = [Connection(), Connection()]
    first, second = (idle.watch(connection) for connection in connections)
    idle.forget(first)
    idle.forget(first)
    loop.run_until(100 + LIMIT_S * 2)
    assert [connection.told for connection in connections] == [0, 1]
    idle.forget(second)
    loop.run_until(1000)
    assert not loop.due
    assert connections[0].told == 0
    idle.watch(connections[0])
    assert len(loop.due) == 1
    idle.close()
    assert not loop.due


def test_one_may_forget_another_when_it_is_told(loop: Loop, idle: IdleConnections) -> None:
    """Its end may end the other, too."""
    other = Connection()

    class Ending(Connection):
        def idled(self) -> None:
            super().idled()
            idle.forget(silence)

    idle.watch(Ending())
    silence = idle.watch(other)
    loop.run_until(1000)
    assert not len(idle)
    assert other.told == 0
