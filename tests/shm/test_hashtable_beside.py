"""Readers of the table of keys to sets beside its writer: interrupted between any two loads, and in two processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shm.hashtable import WAYS, TableReader, TableWriter
from shm.segment import Segment
from tests.shm.hashtables import ARRAYS, FOREVER, MEMBERS, Vector, keys, look, members, reach, segment, shared
from tests.support.children import child, pipe
from tests.support.twins import twin

__all__ = ["shared", "twin"]  # fixtures of every test of this file


# -- interrupted between any two loads ---------------------------------------------------------------------


class Interrupted:
    """An array whose every load is preceded by a call."""

    def __init__(self, inner: Vector, before: Callable[[], None]) -> None:
        self._inner = inner
        self._before = before

    def take(self, *arguments: Any, **named: Any) -> Any:
        self._before()
        return self._inner.take(*arguments, **named)

    def __getitem__(self, index: Any) -> Any:
        self._before()
        return self._inner[index].copy()


LOADS = 20
"""More than a look-up of one key takes: the compiled twin loads each key of a bucket and each word of a bitmap."""


def _interrupted(shared: Segment, at: int, change: Callable[[], None]) -> TableReader:
    """A reader before whose load number `at` the change happens."""
    reader = TableReader(shared)
    loads = 0

    def step() -> None:
        nonlocal loads
        loads += 1
        if loads == at + 1:
            change()

    if reader._compiled is not None:
        reader._compiled.before_load(step)
    for name in ARRAYS:
        setattr(reader, name, Interrupted(getattr(reader, name), step))
    return reader


def _another_key_in_its_place_and_back(writer: TableWriter) -> None:
    writer.expire(FOREVER >> 30)
    writer.add(keys(2), 60, 1)
    writer.expire(FOREVER >> 30)
    writer.add(keys(1), 61, 1)


def _another_key_in_its_place(writer: TableWriter) -> None:
    writer.expire(FOREVER >> 30)
    writer.add(keys(2), 60, 1)


def _its_bitmap_to_another_key(writer: TableWriter) -> None:
    """Key 1 parts from its bitmap, which then is key 3's, without key 1's place being touched otherwise."""
    writer.add(keys(1, 4), 50, 20)
    writer.forget(range(6))
    for member in range(60, 68):
        writer.add(keys(3), member, 21)


def _found(reader: TableReader) -> set[int]:
    return members(reader.find(keys(1)))


def _reached(reader: TableReader) -> set[int]:
    return {member for member, stop in enumerate(reader.reach(keys(1), tuple(range(64)))) if stop}


@pytest.mark.parametrize("look_up", [_found, _reached])
@pytest.mark.parametrize(
    "change", [_another_key_in_its_place, _another_key_in_its_place_and_back, _its_bitmap_to_another_key]
)
@pytest.mark.parametrize("size", [1, 6])
def test_a_reader_interrupted_anywhere_sees_no_other_keys_set(
    tmp_path: Path, change: Callable[[TableWriter], None], size: int, look_up: Callable[[TableReader], set[int]]
) -> None:
    for at in range(LOADS):
        shared = segment(tmp_path / "table", capacity=WAYS, pool=2)
        writer = TableWriter(shared)
        for member in range(size):
            writer.add(keys(1), member, 1)
        reader = _interrupted(shared, at, lambda: change(writer))  # noqa: B023  # called before the loop goes on
        seen = look_up(reader)
        assert seen <= {*range(size), 50} or seen == {61}, (at, seen)


class Still(Segment):
    """Says that its sequence never moves."""

    def array(self, name: str) -> Vector:
        found = super().array(name)
        return np.zeros_like(found) if name == "sequence" else found


def test_without_the_sequence_a_reader_sees_another_keys_set(tmp_path: Path) -> None:
    """The protection switched off: the same interruption, and a sequence that never moves."""
    wrong = 0
    for at in range(LOADS):
        shared = segment(tmp_path / "table", capacity=WAYS)
        writer = TableWriter(shared)
        writer.add(keys(1), 0, 1)
        still = Still.attach(tmp_path / "table")
        reader = _interrupted(still, at, lambda: _another_key_in_its_place(writer))  # noqa: B023  # as above
        wrong += members(reader.find(keys(1))) == {60}
    assert wrong


# -- two processes -----------------------------------------------------------------------------------------


def _own(key: int) -> set[int]:
    """The only members that a key ever gets; keys of one bucket share few."""
    return {(key * 7 + i * 13) % MEMBERS for i in range(9)}


def _write(path: Path, ready: Any) -> None:
    shared = Segment.attach(path, writable=True)
    writer = TableWriter(shared)
    rng = np.random.default_rng(1)
    tick = 0
    ready.send(True)
    while not ready.poll():
        tick += 1
        first = int(rng.integers(1, 400))
        run = np.arange(first, first + 8, dtype=np.int64)
        for key in run.tolist():
            members_ = sorted(_own(key))
            writer.add(keys(key), members_[int(rng.integers(len(members_)))], tick)
        if tick % 50 == 0:
            writer.forget([int(rng.integers(MEMBERS))])
        if tick % 80 == 0:
            writer.expire(tick - 20)


def test_beside_a_writer_no_key_is_seen_with_anothers_members(tmp_path: Path) -> None:
    segment(tmp_path / "table", capacity=8 * WAYS, pool=8)
    reader = TableReader(Segment.attach(tmp_path / "table"))
    here, there = pipe()
    with child(_write, tmp_path / "table", there):
        assert here.recv()
        rng = np.random.default_rng(2)
        found = 0
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            first = int(rng.integers(1, 400))
            run = np.arange(first, first + 8, dtype=np.int64)
            seen = reader.find(run)
            reached = enumerate(reader.reach(run, tuple(range(64))))
            for member, stop in (*reach(seen).items(), *((member, stop) for member, stop in reached if stop)):
                assert member in _own(first + stop - 1), first + stop - 1
            found += len(seen.at)
        here.send(True)
    assert found > 100


def test_forgetting_in_steps_misses_nothing_that_is_added_in_between(
    shared: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shm.hashtable.writer._CHUNK", 64)
    writer, reader = TableWriter(shared), TableReader(shared)
    numbers = np.arange(1, 257, dtype=np.int64)
    for member in (1, 2, 3, 4):
        writer.add(numbers, member, 1)
    steps = 0
    for _ in writer.forgetting([1]):
        writer.add(numbers, 5 + steps % 8, 2)  # words become bitmaps, before their turn and behind it
        steps += 1
    assert steps > 4
    for number in numbers.tolist():
        had = look(reader, number)
        assert had is not None
        assert 1 not in had, (number, had)
        assert 5 in had, (number, had)
