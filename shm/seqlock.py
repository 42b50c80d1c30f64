"""Rows with one writer, and snapshots of them that are never torn.

    values     (columns, slots): a row is one slot's cell in each column, so a column is a ready-made vector
    sequence   (slots,): odd while the slot's row is being written
    version    one cell, bumped after every write: what a reader compares before it copies anything

    writer                                   reader
    1  sequence[s] := odd                    1  read version; unchanged since a whole snapshot -> nothing to do
    2  values[.., s] := ..                   2  copy the sequence column
    3  sequence[s] := even, higher           3  copy the values
    4  version += 1                          4  read the sequence column again
                                                a slot that is odd or differs keeps its previous whole copy

The reader never retries and never waits, so a writer that is stopped or dead in the middle of a row costs it
nothing: that one slot stays as it was. Without this order:

* store 1 after 2: (1) the writer changes half a row, (2) a reader copies everything with an even, equal sequence
  on both sides, (3) it accepts a row that never existed.
* load 4 missing: (1) the reader sees even, (2) the writer goes through 1 and half of 2, (3) the reader copies that.
* store 4 before 3: (1) the reader sees the new version and copies while the slot is odd, (2) it remembers the new
  version, (3) the row is completed and nobody ever looks again. (The reader also looks again by itself while its
  last snapshot was not whole, so a writer that dies between 3 and 4 hides one write at most, until the next.)

These orders are store-store and load-load, which x86-64 keeps (see `shm.fence`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class RowWriter:
    """The writing half; exactly one process has one. `values` and `sequence` are flat cells of the mapped block."""

    def __init__(self, sequence: memoryview, values: memoryview, version: memoryview) -> None:
        self._sequence = sequence
        self._values = values
        self._version = version
        self._slots = len(sequence)

    def write(self, slot: int, changes: Mapping[int, int], also: Callable[[], None] | None = None) -> None:
        """Store `changes` (column -> value, in their order) as one step for every reader.

        `also` runs inside the odd window: for bytes that belong to the row. If it raises, the slot stays odd as
        after a crash, and the next write repairs it. A slot that a dead writer left odd is repaired likewise, and
        its columns not named in `changes` hold whatever the dead one had stored.
        """
        slots = self._slots
        odd = self._sequence[slot] | 1
        self._sequence[slot] = odd
        for column, value in changes.items():
            self._values[column * slots + slot] = value
        if also is not None:
            also()
        self._sequence[slot] = odd + 1
        self._version[0] += 1

    def read(self, slot: int, column: int) -> int:
        """A cell as this writer left it."""
        value: int = self._values[column * self._slots + slot]
        return value

    def torn(self) -> list[int]:
        """Slots that a dead writer left odd. Whoever takes over must write each of them."""
        return [slot for slot, sequence in enumerate(self._sequence.tolist()) if sequence & 1]


class RowReader:
    """The reading half: `values` and `whole` are its own memory and change only in `refresh`."""

    def __init__(self, sequence: NDArray[np.int64], values: NDArray[np.int64], version: memoryview) -> None:
        self._sequence = sequence
        self._shared = values
        self._version = version
        self._seen = -1
        self._complete = False
        self.values: NDArray[np.int64] = np.zeros_like(values)
        """The last whole copy of every row; zeros where there is none yet."""
        self.whole: NDArray[np.bool_] = np.zeros(len(sequence), dtype=np.bool_)
        """Slots of which a whole copy exists."""
        self._copied: NDArray[np.int64] = np.full(len(sequence), -1, dtype=np.int64)

    @property
    def complete(self) -> bool:
        """Whether the last snapshot found every row at rest."""
        return self._complete

    def refresh(self) -> bool:
        """Bring the snapshot up to date; False = nothing can have changed since the last call."""
        version = self._version[0]
        if version == self._seen and self._complete:
            return False
        before = self._sequence.copy()
        moved = np.flatnonzero(before != self._copied)
        if len(moved) * 4 > len(before):
            self._copy(before, slice(None))
        elif len(moved):
            self._copy(before[moved], moved)
        else:
            self._complete = True
        self._seen = version
        return True

    def _copy(self, before: NDArray[np.int64], slots: slice | NDArray[np.intp]) -> None:
        """Copy the rows of `slots`, and keep those that were at rest before and after."""
        rows = self._shared[:, slots]
        if isinstance(slots, slice):
            rows = rows.copy()  # a slice is a window on shared memory, an index array has copied already
        good = before == self._sequence[slots]
        good &= (before & 1) == 0
        self._complete = bool(good.all())
        if self._complete:
            self.values[:, slots] = rows
            self._copied[slots] = before
            self.whole[slots] = True
            return
        kept = np.flatnonzero(good) if isinstance(slots, slice) else slots[good]
        self.values[:, kept] = rows[:, good]
        self._copied[kept] = before[good]
        self.whole[kept] = True

    def guarded(self, slot: int, read: Callable[[], T]) -> T | None:
        """What `read` (of bytes that belong to the row) returned, or None if the row was written meanwhile."""
        before = self._sequence[slot]
        if before & 1:
            return None
        result = read()
        return result if self._sequence[slot] == before else None
