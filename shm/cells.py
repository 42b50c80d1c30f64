"""Counters that only rise, in rows with one owner each.

Two counters make a gauge: what is in flight is `started - finished`. Neither ever falls, so neither a dead owner
nor its successor can take back what others have seen, and the same cells can be shown as they are.

The reader loads `finished` first and `started` second. Without this: (1) the reader loads started = 5, (2) the
owner starts a sixth and finishes it, (3) the reader loads finished = 6, and minus one is in flight.
As both only rise, the difference is also never too small for the moment between the two loads, and a difference of
0 proves that nothing was in flight at any moment between them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class CounterRow:
    """One owner's counters, a flat row of `columns * width` cells; only the owner's process holds one.

    `cells` is public for code that counts on a hot path: `row.cells[column * width + index] += 1`.
    """

    __slots__ = ("cells", "width")

    def __init__(self, cells: memoryview, width: int) -> None:
        self.cells = cells
        self.width = width

    def add(self, column: int, index: int, amount: int = 1) -> None:
        """Raise a counter. One load and one store: no other process writes this cell."""
        if amount < 0:
            raise ValueError(f"a counter only rises, not by {amount}")
        self.cells[column * self.width + index] += amount

    def load(self, column: int, index: int) -> int:
        value: int = self.cells[column * self.width + index]
        return value

    def close(self) -> None:
        """Let go of the row. Idempotent."""
        self.cells.release()


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
