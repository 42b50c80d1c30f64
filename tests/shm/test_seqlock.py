"""Rows and snapshots in one process: every interleaving of a write with a look, one at a time.

What two CPUs make of it is in tests/stress.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shm import seqlock
from shm.seqlock import Copying, RowReader, RowWriter, Snapshot
from tests.support.twins import twin

__all__ = ["twin"]

COLUMNS, SLOTS = 3, 4


class Hooked:
    """Wraps cells or an array; `step` is called before every load and before every store."""

    def __init__(self, inner: Any, step: Callable[[], None]) -> None:
        self._inner = inner
        self._step = step

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):  # rows: copied column by column, as numpy does
            return np.array([self[column][index[1]] for column in range(len(self))])
        self._step()
        found = self._inner[index]
        return Hooked(found, self._step) if isinstance(index, slice) else found

    def __setitem__(self, index: Any, value: int) -> None:
        self._step()
        self._inner[index] = value

    def copy(self) -> Any:
        self._step()
        return self._inner.copy()

    def tolist(self) -> Any:
        return self._inner.tolist()


@dataclass
class Rows:
    """The shared cells of a row table, and hooks between any two accesses of either side."""

    on_write: Callable[[], None] = lambda: None
    on_read: Callable[[], None] = lambda: None
    values: NDArray[np.int64] = field(default_factory=lambda: np.zeros((COLUMNS, SLOTS), dtype=np.int64))
    sequence: NDArray[np.int64] = field(default_factory=lambda: np.zeros(SLOTS, dtype=np.int64))
    cells: NDArray[np.int64] = field(default_factory=lambda: np.zeros(2, dtype=np.int64))

    def writer(self) -> RowWriter:
        def hooked(cells: NDArray[np.int64]) -> Any:
            return Hooked(memoryview(cells.reshape(-1)), lambda: self.on_write())

        return RowWriter(hooked(self.sequence), hooked(self.values), hooked(self.cells[:1]), hooked(self.cells[1:]))

    def reader(self) -> RowReader:
        step = lambda: self.on_read()  # noqa: E731  # late binding is the point
        reader = RowReader(self.sequence, self.values, memoryview(self.cells[:1]), memoryview(self.cells[1:]))
        hooked = [(reader, "_version"), (reader, "_used")]
        if isinstance(reader._snapshot, Snapshot):
            hooked += [(reader._snapshot, "_sequence"), (reader._snapshot, "_shared")]
        else:
            reader._snapshot.before_load(step)  # type: ignore[attr-defined]  # of the compiled twin
        for holder, name in hooked:
            setattr(holder, name, Hooked(getattr(holder, name), step))
        return reader


class DeadError(Exception):
    """Stands for kill -9."""


def die() -> None:
    raise DeadError


def kind(*them: NDArray[np.int64]) -> Copying:
    """A snapshot of the twin that is tested."""
    return Snapshot(*them) if seqlock.compiled is None else seqlock.compiled(*them)


def full_row(value: int) -> dict[int, int]:
    return dict.fromkeys(range(COLUMNS), value)


def at(moment: int, action: Callable[[], object]) -> Callable[[], None]:
    """A hook that acts once, at its `moment`-th call."""
    calls: Iterator[int] = iter(range(1_000_000))

    def hook() -> None:
        if next(calls) == moment:
            action()

    return hook


def test_a_write_is_seen_at_the_next_look_and_then_nothing_is_new() -> None:
    rows = Rows()
    writer, reader = rows.writer(), rows.reader()
    assert not reader.refresh()
    assert not reader.whole.any()
    writer.write(2, {0: 5, 2: -7})
    assert reader.refresh()
    assert reader.values.tolist() == [[0, 0, 5, 0], [0, 0, 0, 0], [0, 0, -7, 0]]
    assert reader.whole[2]
    assert not reader.refresh()


def test_nothing_but_the_version_is_loaded_while_it_stands() -> None:
    rows = Rows()
    writer, reader = rows.writer(), rows.reader()
    writer.write(0, full_row(1))
    reader.refresh()
    loads = []
    rows.on_read = lambda: loads.append(1)
    assert not reader.refresh()
    assert len(loads) == 1


def test_a_torn_row_keeps_its_previous_values() -> None:
    rows = Rows()
    writer, reader = rows.writer(), rows.reader()
    writer.write(1, full_row(5))
    writer.write(3, full_row(6))
    reader.refresh()
    rows.sequence[1] += 1  # a writer died here
    rows.values[0, 1] = 77
    writer.write(3, full_row(8))
    assert reader.refresh()
    assert reader.values[:, 1].tolist() == [5, 5, 5]
    assert reader.values[:, 3].tolist() == [8, 8, 8]
    assert not reader.complete
    assert not reader.refresh()  # it looked again, and there was nothing to copy


def test_a_row_that_was_never_whole_is_none() -> None:
    rows = Rows()
    reader = rows.reader()
    rows.cells[1] = 1
    rows.sequence[0] = 1
    assert not reader.refresh()
    assert not reader.whole[0]


def test_the_next_writer_repairs_what_a_dead_one_left_odd() -> None:
    rows = Rows()
    rows.sequence[:] = [2, 5, 0, 1]
    writer, reader = rows.writer(), rows.reader()
    assert writer.torn() == [1, 3]
    for slot in writer.torn():
        writer.write(slot, full_row(9))
    assert rows.sequence.tolist() == [2, 6, 0, 2]
    assert reader.refresh()
    assert reader.values[:, 1].tolist() == [9, 9, 9]


def test_bytes_are_stored_inside_the_odd_window() -> None:
    rows = Rows()
    writer = rows.writer()
    seen = []

    def also() -> None:
        seen.append((int(rows.sequence[0]) & 1, rows.values[0, 0]))
        writer.store(0, 1, 8)

    writer.write(0, {0: 7}, also)
    assert seen == [(1, 7)]
    assert writer.load(0, 1) == 8
    assert rows.sequence[0] == 2


def test_a_write_that_fails_leaves_the_row_odd_until_the_next() -> None:
    rows = Rows()
    writer, reader = rows.writer(), rows.reader()

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        writer.write(0, {0: 7}, fail)
    assert writer.torn() == [0]
    assert not reader.refresh()
    writer.write(0, full_row(8))
    assert writer.torn() == []
    assert reader.refresh()


@pytest.mark.parametrize("moment", range(12))
def test_a_look_between_any_two_stores_sees_the_old_row_or_the_new(moment: int) -> None:
    rows = Rows()
    writer, reader = rows.writer(), rows.reader()
    writer.write(1, full_row(5))
    reader.refresh()
    rows.on_write = at(moment, reader.refresh)
    writer.write(1, full_row(6))
    assert len(set(reader.values[:, 1].tolist())) == 1
    reader.refresh()
    assert reader.values[:, 1].tolist() == [6, 6, 6]


def test_a_row_that_was_odd_is_looked_for_even_if_its_version_never_comes() -> None:
    """Its writer died between the row and the version."""
    rows = Rows()
    writer, reader = rows.writer(), rows.reader()
    rows.cells[1] = 1
    rows.sequence[0] = 1
    rows.cells[0] = 1
    reader.refresh()
    rows.on_write = at(4 + COLUMNS, die)  # loads: used, sequence; stores: sequence, columns, sequence; then the version
    with pytest.raises(DeadError):
        writer.write(0, full_row(5))
    assert rows.sequence[0] == 2
    assert rows.cells[0] == 1
    assert reader.refresh()
    assert reader.values[:, 0].tolist() == [5, 5, 5]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("moment", range(10))
def test_writes_between_any_two_loads_are_not_mixed_into_the_row(moment: int, count: int) -> None:
    rows = Rows()
    writer, reader = rows.writer(), rows.reader()
    writer.write(1, full_row(5))

    def write() -> None:
        for value in range(count):
            writer.write(1, full_row(6 + value))

    rows.on_read = at(moment, write)
    reader.refresh()
    assert len(set(reader.values[:, 1].tolist())) == 1
    rows.on_read = lambda: None
    write()
    reader.refresh()
    assert reader.values[:, 1].tolist() == [5 + count] * 3


@pytest.mark.parametrize("moment", range(10))
def test_a_new_slot_between_any_two_loads_is_found_by_the_next_look(moment: int) -> None:
    rows = Rows()
    writer, reader = rows.writer(), rows.reader()
    writer.write(0, full_row(5))
    rows.on_read = at(moment, lambda: writer.write(3, full_row(6)))
    reader.refresh()
    rows.on_read = lambda: None
    reader.refresh()
    assert reader.values[:, 3].tolist() == ([6, 6, 6] if rows.cells[1] == 4 else [0, 0, 0])


@given(st.data())
def test_any_half_write_under_any_look_leaves_only_whole_rows(data: st.DataObject) -> None:
    """A writer that dies after any of its stores, at any of the reader's loads; then a successor."""
    rows = Rows()
    writer, reader = rows.writer(), rows.reader()
    written = {0}

    for value in range(1, data.draw(st.integers(1, 6)) + 1):
        slot = data.draw(st.integers(0, SLOTS - 1))
        written.add(value)
        rows.on_write = at(data.draw(st.integers(0, 12)), die)

        def write(slot: int = slot, value: int = value) -> None:
            with contextlib.suppress(DeadError):
                writer.write(slot, full_row(value))

        rows.on_read = at(data.draw(st.integers(0, 20)), write)
        reader.refresh()
        for row in reader.values.T.tolist():
            assert len(set(row)) == 1
            assert row[0] in written
    rows.on_write = rows.on_read = lambda: None
    for slot in writer.torn():
        writer.write(slot, full_row(99))
    rows.cells[0] += 1
    reader.refresh()
    assert reader.complete
    assert (reader.values == rows.values).all()


def test_guarded_reading_refuses_what_was_written_meanwhile() -> None:
    rows = Rows()
    writer, reader = rows.writer(), rows.reader()
    assert reader.guarded(0, lambda: "read") == "read"
    assert reader.guarded(0, lambda: writer.write(0, full_row(1))) is None
    rows.sequence[0] |= 1
    assert reader.guarded(0, lambda: "read") is None


def test_each_twin_is_the_one_that_was_asked_for(twin: str) -> None:
    assert isinstance(Rows().reader()._snapshot, Snapshot) is (twin == "python")


def arrays(columns: int = 2, slots: int = 3) -> list[NDArray[np.int64]]:
    return [np.zeros(shape, dtype=np.int64) for shape in [slots, (columns, slots), slots, (columns, slots)]]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(
    "wrong",
    [
        lambda right: right[..., :-1],  # not contiguous, or shorter
        lambda right: right[:0],
        lambda right: np.zeros(right.shape, dtype=np.int32),
        lambda right: np.zeros((1, *right.shape), dtype=np.int64),
    ],
)
def test_arrays_of_different_tables_are_refused(which: int, wrong: Callable[[Any], Any], twin: str) -> None:
    if twin == "python":
        pytest.skip("numpy sees to it")
    them = arrays()
    them[which] = wrong(them[which])
    with pytest.raises(ValueError, match=r"array|contiguous"):
        kind(*them)


def test_what_is_read_only_is_not_written(twin: str) -> None:
    shared, copied = arrays()[:2], arrays()[2:]
    for array in shared:
        array.setflags(write=False)
    assert kind(*shared, *copied).renew(3) == (0, 0)
    copied[1].setflags(write=False)
    if twin == "compiled":
        with pytest.raises(ValueError, match="read-only"):
            kind(*shared, *copied)


@given(st.integers(-1, 5), st.lists(st.integers(0, 9), min_size=4, max_size=4), st.integers(0, 2**32))
def test_twins_copy_and_miss_the_same_rows(used: int, sequence: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    shared = np.array(sequence), random.integers(-(2**62), 2**62, (3, 4))
    found = []
    for make in [Snapshot, *([seqlock.compiled] if seqlock.compiled else [])]:
        copied, values = np.array([0, 2, 4, 6]), np.zeros((3, 4), dtype=np.int64)
        counts = make(*shared, copied, values).renew(max(used, 0))
        found.append((counts, copied.tolist(), values.tolist()))
    assert found[1:] == found[:-1]
