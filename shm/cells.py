"""Counters that only rise, in rows with one owner each.

Two counters make a gauge: what is in flight is `started - finished`. Neither ever falls, so neither a dead owner
nor its successor can take back what others have seen, and the same cells can be shown as they are.

The reader loads `finished` first and `started` second. Without this: (1) the reader loads started = 5, (2) the
owner starts a sixth and finishes it, (3) the reader loads finished = 6, and minus one is in flight.
As both only rise, the difference is also never too small for the moment between the two loads, and a difference of
0 proves that nothing was in flight at any moment between them.

Single cells and gauges have twins in C (`_cells.c`) beside the Python here, for installations with a compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from shm.compiled import is_wanted

compiled: ModuleType | None = None
"""The compiled twins; None: there are none, or they are not wanted."""
if is_wanted():
    with contextlib.suppress(ImportError):
        from shm import _cells

        compiled = _cells

Vector = NDArray[np.int64]

_SINGLY: Final = 16
"""Cells up to which lists are added up faster than numpy is called: 0.9 instead of 2.1 us for four."""


class Cells(Protocol):
    """Cells of shared memory, one at a time: a `memoryview` of them, or its twin."""

    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...
    def release(self) -> None: ...


def quick(cells: memoryview) -> Cells:
    """The same cells, for a hot path."""
    return cells if compiled is None else compiled.Cells(cells)


def _add(cells: Cells, *pairs: int) -> None:
    """`add` without its twin."""
    for index, amount in zip(pairs[::2], pairs[1::2], strict=True):
        cells[index] += amount


add: Final[Callable[..., None]] = _add if compiled is None else compiled.add
"""`add(cells, index, amount, index, amount, ...)`: raises cells that no other process writes, in this order."""


class CounterRow:
    """One owner's counters, a flat row of `columns * width` cells; only the owner's process holds one.

    `cells` is public for code that counts on a hot path: `add(row.cells, column * width + index, 1)`.
    """

    __slots__ = ("cells", "width")

    def __init__(self, cells: Cells, width: int) -> None:
        self.cells = cells
        self.width = width

    def add(self, column: int, index: int, amount: int = 1) -> None:
        """Raise a counter. One load and one store: no other process writes this cell."""
        if amount < 0:
            raise ValueError(f"a counter only rises, not by {amount}")
        self.cells[column * self.width + index] += amount

    def load(self, column: int, index: int) -> int:
        return self.cells[column * self.width + index]

    def close(self) -> None:
        """Let go of the row. Idempotent."""
        self.cells.release()


class Measures(Protocol):
    """What is in flight, by pairs of counters; `Gauges` or its twin. Each call is for now, and keeps nothing."""

    def one(self, finished: int, started: int, index: int, /) -> int:
        """The sum over the rows of `started - finished`, two columns, at `index`."""

    def few(self, finished: int, started: int, indices: tuple[int, ...], /) -> tuple[int, ...]:
        """The same at each of them."""

    def many(self, finished: int, started: int, indices: Vector, out: Vector, /) -> None:
        """The same into `out`."""


class Gauges:
    """What the owners of all rows have in flight, from their counters in a block (rows, columns, width)."""

    def __init__(self, block: NDArray[np.int64], rows: memoryview, used: memoryview) -> None:
        """`rows` is a cell: how many rows have ever had an owner. `used` is another one: every index asked for is
        below it."""
        self._block = block
        self._rows = rows
        self._used = used
        self._key = (-1, -1)
        self._windows: dict[int, NDArray[np.int64]] = {}

    def one(self, finished: int, started: int, index: int) -> int:
        item, rows = self._block.item, range(self._rows[0])
        gauge = 0
        for row in rows:
            gauge -= item(row, finished, index)
        for row in rows:
            gauge += item(row, started, index)
        return gauge

    def few(self, finished: int, started: int, indices: tuple[int, ...]) -> tuple[int, ...]:
        ended, begun = self._window(finished), self._window(started)
        if ended.size <= _SINGLY:
            less, more = ended.tolist(), begun.tolist()
            return tuple([sum([row[i] for row in more]) - sum([row[i] for row in less]) for i in indices])
        gauges = np.empty(len(indices), dtype=np.int64)
        self.many(finished, started, np.array(indices, dtype=np.int64), gauges)
        return tuple(gauges.tolist())

    def many(self, finished: int, started: int, indices: Vector, out: Vector) -> None:
        ended = np.add.reduce(self._window(finished), 0)
        begun: Vector = np.add.reduce(self._window(started), 0)
        begun -= ended
        begun.take(indices, out=out)

    def _window(self, column: int) -> NDArray[np.int64]:
        """The live cells of a column, as far as they are in use."""
        key: tuple[int, int] = self._rows[0], self._used[0]
        if key != self._key:
            self._windows.clear()
            self._key = key
        window = self._windows.get(column)
        if window is None:
            window = self._windows[column] = self._block[: key[0], column, : key[1]]
        return window


def gauges(block: NDArray[np.int64], rows: memoryview, used: memoryview) -> Measures:
    """`Gauges`, or its twin."""
    return Gauges(block, rows, used) if compiled is None else compiled.Gauges(block, rows, used)


def settle(row: NDArray[np.int64], started: int, finished: int, abandoned: int) -> int:
    """End what a dead owner had in flight, in its row (columns, width); returns how much that was.

    Called after the owner is known to be dead and before its successor starts: in between the row has no writer, so
    the caller may be it. Nothing is zeroed: `finished` rises to `started`, `abandoned` by the difference.
    Without the first half of the rule: (1) the owner is slow, not dead, (2) its row is settled, (3) it finishes the
    same requests again, and what is in flight turns negative for ever.
    """
    lost = row[started] - row[finished]
    row[finished] += lost
    row[abandoned] += lost
    return int(lost.sum())
