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

Steps 2 to 4 have a twin in C (`_rows.c`), which takes them row by row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from shm.cells import Vector, quick
from shm.compiled import is_wanted

T = TypeVar("T")

compiled: type[Compiled] | None = None
"""The compiled twin of `Snapshot`; None: there is none, or it is not wanted."""
if is_wanted():
    with contextlib.suppress(ImportError):
        from shm._rows import Snapshot as Compiled

        compiled = Compiled


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


class Copying(Protocol):
    """Rows that are kept, brought up to date; `Snapshot` or its twin."""

    def renew(self, used: int, /) -> tuple[int, int]:
        """Steps 2 to 4 of a look: how many rows were copied, and how many had to stay as they were."""


class Snapshot:
    """The last whole copy of every row in `values`, and its sequence in `copied`."""

    def __init__(self, sequence: Vector, shared: Vector, copied: Vector, values: Vector) -> None:
        """The first two are the writer's."""
        self._sequence = sequence
        self._shared = shared
        self._copied = copied
        self._values = values

    def renew(self, used: int) -> tuple[int, int]:
        before = self._sequence[:used].copy()
        moved = np.flatnonzero(before != self._copied[:used])
        if not len(moved):
            return 0, 0
        before = before[moved]
        rows = self._shared[:, moved]  # indexing by an array copies
        good = self._sequence[moved] == before
        good &= (before & 1) == 0
        missed = len(moved) - int(np.count_nonzero(good))
        if missed:
            moved, before, rows = moved[good], before[good], rows[:, good]
        self._values[:, moved] = rows
        self._copied[moved] = before
        return len(moved), missed


class RowReader:
    """The reading half: `values` is its own memory and changes only in `refresh`."""

    def __init__(self, sequence: Vector, values: Vector, version: memoryview, used: memoryview) -> None:
        self._sequence = sequence
        self._version = quick(version)
        self._used = quick(used)
        self._seen = -1
        self._copied: Vector = np.zeros(len(sequence), dtype=np.int64)
        self.complete = False
        """Whether the last look found every row at rest."""
        self.values: Vector = np.zeros_like(values)
        """The last whole copy of every row; zeros where there is none yet."""
        arrays = sequence, values, self._copied, self.values
        self._snapshot: Copying = Snapshot(*arrays) if compiled is None else compiled(*arrays)

    @property
    def whole(self) -> NDArray[np.bool_]:
        """Slots of which a whole copy exists."""
        whole: NDArray[np.bool_] = self._copied != 0
        return whole

    def refresh(self) -> bool:
        """Bring the snapshot up to date; returns whether any row was copied. Never waits."""
        version = self._version[0]
        if version == self._seen and self.complete:
            return False
        self._seen = version
        copied, missed = self._snapshot.renew(self._used[0])  # loaded after the version: see above
        self.complete = not missed
        return copied > 0

    def guarded(self, slot: int, read: Callable[[], T]) -> T | None:
        """What `read` (of bytes that belong to the row) returned, or None if the row was written meanwhile."""
        before = self._sequence[slot]
        if before & 1:
            return None
        result = read()
        return result if self._sequence[slot] == before else None
