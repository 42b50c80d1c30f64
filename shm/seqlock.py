"""Rows with one writer, and snapshots of them that are never torn.

    values     (columns, slots): a row is one slot's cell in each column, so a column is a ready-made vector
    sequence   (slots,): odd while the slot's row is being written
    used       one cell: rows below it have ever been written
    version    one cell, bumped after every write: what a reader compares before it copies anything

    writer                                   reader
    1  sequence[s] := odd                    1  load version; unchanged since a whole snapshot -> nothing to do
    2  values[.., s] := ..                   2  copy the sequence column (as far as `used`)
    3  sequence[s] := even, higher           3  copy the rows whose sequence has moved since their last copy
    4  version += 1                          4  load their sequence again
                                                a row that is odd or differs keeps its previous whole copy

The reader never retries and never waits, so a writer that is stopped or dead in the middle of a row costs it
nothing: that one slot stays as it was. Without this order:

* store 1 after 2: (1) the writer changes half a row, (2) a reader copies it with an even, equal sequence on both
  sides, (3) it accepts a row that never existed.
* load 4 missing: (1) the reader sees even, (2) the writer goes through 1 and half of 2, (3) the reader copies that.
* store 4 before 3: (1) the reader sees the new version and finds the row odd, (2) it remembers the version,
  (3) the row is completed and nobody looks again. (A reader also looks again by itself while its last snapshot
  was not whole, so a writer that dies between 3 and 4 hides one write, until the next one.)
* `used` raised after 4: (1) the reader sees the new version and the old `used`, (2) it copies all but the new row.

These orders are store-store and load-load, which x86-64 keeps (see `shm.fence`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shm.cells import quick

T = TypeVar("T")


class RowWriter:
    """The writing half; exactly one process has one. All arguments are flat cells of the mapped blocks."""

    def __init__(self, sequence: memoryview, values: memoryview, version: memoryview, used: memoryview) -> None:
        self._sequence = sequence
        self._values = values
        self._version = version
        self._used = used
        self._slots = len(sequence)

    def write(self, slot: int, changes: Mapping[int, int], also: Callable[[], None] | None = None) -> None:
        """Store `changes` (column -> value, in their order) as one step for every reader.

        `also` runs inside the odd window: for bytes that belong to the row. If it raises, the slot stays odd as
        after a crash, and the next write repairs it. A slot that a dead writer left odd is repaired likewise;
        its columns not named in `changes` hold whatever the dead one had stored.
        """
        slots = self._slots
        if slot >= self._used[0]:
            self._used[0] = slot + 1
        odd = self._sequence[slot] | 1
        self._sequence[slot] = odd
        for column, value in changes.items():
            self._values[column * slots + slot] = value
        if also is not None:
            also()
        self._sequence[slot] = odd + 1
        self._version[0] += 1

    def store(self, slot: int, column: int, value: int) -> None:
        """One cell, for use by `also` when the order among cells and bytes matters."""
        self._values[column * self._slots + slot] = value

    def load(self, slot: int, column: int) -> int:
        """A cell as this writer, or the one before it, left it."""
        value: int = self._values[column * self._slots + slot]
        return value

    def torn(self) -> list[int]:
        """Slots that a dead writer left odd. Whoever takes over must write each of them."""
        return [slot for slot, sequence in enumerate(self._sequence.tolist()) if sequence & 1]


class RowReader:
    """The reading half: `values` and `whole` are its own memory and change only in `refresh`."""

    def __init__(
        self,
        sequence: NDArray[np.int64],
        values: NDArray[np.int64],
        version: memoryview,
        used: memoryview,
    ) -> None:
        self._sequence = sequence
        self._shared = values
        self._version = quick(version)
        self._used = used
        self._seen = -1
        self._copied: NDArray[np.int64] = np.zeros(len(sequence), dtype=np.int64)
        self.complete = False
        """Whether the last look found every row at rest."""
        self.values: NDArray[np.int64] = np.zeros_like(values)
        """The last whole copy of every row; zeros where there is none yet."""
        self.whole: NDArray[np.bool_] = np.zeros(len(sequence), dtype=np.bool_)
        """Slots of which a whole copy exists."""

    def refresh(self) -> bool:
        """Bring the snapshot up to date; returns whether any row was copied. Never waits."""
        version = self._version[0]
        if version == self._seen and self.complete:
            return False
        used = self._used[0]  # after the version: see above
        before = self._sequence[:used].copy()
        moved = np.flatnonzero(before != self._copied[:used])
        self._seen = version
        if not len(moved):
            self.complete = True
            return False
        before = before[moved]
        rows = self._shared[:, moved]  # indexing by an array copies
        good = self._sequence[moved] == before
        good &= (before & 1) == 0
        self.complete = bool(good.all())
        if not self.complete:
            moved, before, rows = moved[good], before[good], rows[:, good]
            if not len(moved):
                return False
        self.values[:, moved] = rows
        self._copied[moved] = before
        self.whole[moved] = True
        return True

    def guarded(self, slot: int, read: Callable[[], T]) -> T | None:
        """What `read` (of bytes that belong to the row) returned, or None if the row was written meanwhile."""
        before = self._sequence[slot]
        if before & 1:
            return None
        result = read()
        return result if self._sequence[slot] == before else None
