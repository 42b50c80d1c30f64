"""What is put goes out at the end of the turn, in order, whatever the connections do meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from frontend.outbox import JOIN_BYTES, MOST, Outbox, Outlet


class Wire:
    """A transport that notes what is written; `on_write` may do what a protocol's callbacks would."""

    def __init__(self, notes: list[tuple[str, bytes]], name: str) -> None:
        self.notes = notes
        self.name = name
        self.closing = False
        self.on_write: Callable[[], None] = lambda: None

    def write(self, data: bytes) -> None:
        self.notes.append((self.name, data))
        self.on_write()

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str) -> None:
        """It has no socket."""


class Turn:
    """In the place of a loop."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []
        self.call_soon = self.due.append

    def end(self) -> None:
        due = self.due.copy()
        self.due.clear()
        for call in due:
            call()


class Scene:
    def __init__(self) -> None:
        self.notes: list[tuple[str, bytes]] = []
        self.turn = Turn()
        self.outbox = Outbox(cast("asyncio.AbstractEventLoop", self.turn))
        self.wires = {name: Wire(self.notes, name) for name in "ab"}
        self.outlets = {
            name: Outlet(cast("asyncio.WriteTransport", wire), self.outbox) for name, wire in self.wires.items()
        }
        self.a, self.b = self.outlets["a"], self.outlets["b"]


def test_what_was_put_goes_out_in_order_when_the_turn_ends() -> None:
    scene = Scene()
    said = [("a", b"1"), ("b", b"2"), ("a", b"3")]
    for name, data in said:
        scene.outlets[name].write(data)
    assert scene.notes == []
    assert (scene.a.held, scene.b.held) == (2, 1)
    scene.turn.end()
    assert scene.notes == said
    assert (scene.a.held, scene.b.held) == (0, 0)
    assert not scene.turn.due


def test_a_flush_writes_at_once_and_the_turns_end_finds_nothing() -> None:
    scene = Scene()
    scene.a.write(b"1")
    scene.outbox.flush()
    assert scene.notes == [("a", b"1")]
    scene.turn.end()
    assert scene.notes == [("a", b"1")]


def test_those_that_came_first_do_not_wait_for_too_many_others() -> None:
    scene = Scene()
    for name in ("ab" * MOST)[: MOST - 1]:
        scene.outlets[name].write(b"1")
    assert scene.notes == []
    scene.b.write(b"2")
    assert len(scene.notes) == MOST


def test_small_writes_in_a_row_to_one_connection_are_one() -> None:
    scene = Scene()
    for name, data in [("a", b"1"), ("a", b"2"), ("b", b"3"), ("b", b"4" * JOIN_BYTES), ("a", b"5")]:
        scene.outlets[name].write(data)
    scene.turn.end()
    assert scene.notes == [("a", b"12"), ("b", b"3"), ("b", b"4" * JOIN_BYTES), ("a", b"5")]
    assert (scene.a.held, scene.b.held) == (0, 0)


def test_nothing_joins_what_is_being_written() -> None:
    scene = Scene()

    def more() -> None:
        scene.wires["a"].on_write = lambda: None
        scene.a.write(b"2")

    scene.wires["a"].on_write = more
    scene.a.write(b"1")
    scene.turn.end()
    assert scene.notes == [("a", b"1"), ("a", b"2")]
    assert scene.a.held == 0


def test_a_connection_that_ended_meanwhile_hears_nothing() -> None:
    scene = Scene()
    scene.a.write(b"1")
    scene.b.write(b"2")
    scene.wires["a"].closing = True
    scene.turn.end()
    assert scene.notes == [("b", b"2")]
    assert scene.a.held == 0


@pytest.mark.parametrize("flushes", [True, False])
def test_the_order_stays_when_a_write_calls_back_and_more_is_put(flushes: bool) -> None:
    scene = Scene()

    def more() -> None:
        scene.wires["a"].on_write = lambda: None
        scene.b.write(b"3")
        if flushes:
            scene.outbox.flush()

    scene.wires["a"].on_write = more
    scene.a.write(b"1")
    scene.b.write(b"2")
    scene.turn.end()
    scene.turn.end()
    assert scene.notes == [("a", b"1"), ("b", b"23")]


def test_one_that_fails_keeps_nobodys_bytes_back() -> None:
    scene = Scene()

    def fail() -> None:
        raise RuntimeError

    scene.wires["a"].on_write = fail
    scene.a.write(b"1")
    scene.b.write(b"2")
    with pytest.raises(RuntimeError):
        scene.turn.end()
    scene.turn.end()
    assert scene.notes == [("a", b"1"), ("b", b"2")]
