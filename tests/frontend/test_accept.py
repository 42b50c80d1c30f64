"""Taking connections: one per wake, a moment of waiting when ahead, everything at the stop, no spin without room."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from typing import Any, cast

import pytest

from frontend.accept import NO_ROOM_S, PATIENCE, YIELD_S, Acceptor
from tests.frontend.fakes import Time


class Listener:
    """A listening socket with a backlog that the test fills."""

    def __init__(self) -> None:
        self.backlog = 0
        self.refusal: OSError | None = None
        self.closed = False

    def fileno(self) -> int:
        return 7

    def setblocking(self, flag: bool) -> None: ...

    def accept(self) -> tuple[Any, Any]:
        if self.refusal is not None:
            raise self.refusal
        if not self.backlog:
            raise BlockingIOError
        self.backlog -= 1
        return self, None

    def close(self) -> None:
        self.closed = True


class Loop(Time):
    """A loop whose reader is woken by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.reader: Callable[[], None] | None = None
        self.taken = 0

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        self.reader = call

    def remove_reader(self, fd: int) -> None:
        self.reader = None

    def connect_accepted_socket(self, protocol: object, connection: object) -> object:
        return None

    def create_task(self, coroutine: object) -> Loop:
        self.taken += 1
        return self

    def add_done_callback(self, call: object) -> None: ...

    def wake(self) -> None:
        assert self.reader is not None
        self.reader()


class Door:
    def __init__(self) -> None:
        self.listener, self.loop, self.ahead = Listener(), Loop(), False
        self.acceptor = Acceptor(
            cast("socket.socket", self.listener),
            asyncio.Protocol,
            lambda uncounted: self.ahead,
            cast("asyncio.AbstractEventLoop", self.loop),
        )
        self.acceptor.start()


@pytest.fixture
def door() -> Door:
    return Door()


def test_one_connection_is_taken_per_wake(door: Door) -> None:
    door.listener.backlog = 5
    door.loop.wake()
    assert (door.loop.taken, door.listener.backlog) == (1, 4)


def test_a_wake_for_a_connection_that_another_has_taken_is_no_error(door: Door) -> None:
    door.loop.wake()
    assert door.loop.taken == 0


def test_who_is_ahead_waits_deaf_and_then_takes_what_is_still_there(door: Door) -> None:
    door.ahead = True
    door.listener.backlog = 1
    door.loop.wake()
    assert (door.loop.taken, door.loop.reader) == (0, None)
    door.loop.advance(YIELD_S)
    assert door.loop.taken == 1
    assert door.loop.reader is not None


def test_what_another_takes_meanwhile_is_left_to_it(door: Door) -> None:
    door.ahead = True
    door.listener.backlog = 1
    door.loop.wake()
    door.listener.backlog = 0
    door.loop.advance(YIELD_S)
    assert door.loop.taken == 0


def test_with_neighbours_that_never_take_one_a_burst_is_taken_in_few_waits(door: Door) -> None:
    door.ahead = True
    door.listener.backlog = 500
    waits = 0
    while door.listener.backlog:
        door.loop.wake()
        door.loop.advance(YIELD_S)
        waits += 1
    assert waits <= PATIENCE + 16
    assert door.loop.taken == 500


def test_the_stop_takes_the_backlog_and_lets_go_of_the_socket(door: Door) -> None:
    door.ahead = True
    door.listener.backlog = 9
    door.loop.wake()
    door.acceptor.stop()
    door.acceptor.stop()
    assert door.loop.taken == 9
    assert door.listener.closed
    assert door.loop.reader is None
    assert door.loop.pending == 0


def test_without_file_descriptors_it_waits_instead_of_spinning(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    door.listener.backlog = 1
    door.listener.refusal = OSError(errno.EMFILE, "Too many open files")
    door.loop.wake()
    assert door.loop.reader is None
    door.listener.refusal = None
    door.loop.advance(NO_ROOM_S)
    door.loop.wake()
    assert door.loop.taken == 1
    assert "Too many open files" in caplog.text


def test_the_stop_ends_even_without_file_descriptors(door: Door) -> None:
    door.listener.refusal = OSError(errno.EMFILE, "Too many open files")
    door.acceptor.stop()
    assert door.listener.closed
