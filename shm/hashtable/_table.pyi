"""The compiled twins of `TableReader.find`, `TableReader.reach` and `TableWriter.add`; `_table.c` has the reasons."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from shm.hashtable.layout import Vector

class Table:
    """Holds the arrays of one table. Raises ValueError when they do not fit together."""

    def __init__(
        self, cells: Vector, sequence: Vector, keys: Vector, members: Vector, uses: Vector, pool: Vector, /
    ) -> None: ...
    def find(self, keys: Vector, out: Vector, reach: Vector, /) -> int:
        """How many keys were found. `Found.at`, `places` and `moments` stand at the ends of the three rows of `out`,
        each as long as `keys`; `reach`, zeroed before, is filled."""

    def reach(self, keys: Vector, members: tuple[int, ...], /) -> list[int]:
        """As `TableReader.reach`, for at most 64 members. Raises ValueError for more, for one twice, or for one that no
        set can have."""

    def uses(self, places: Vector, moments: Vector, which: Vector, tick: int, out: NDArray[np.float64], /) -> None:
        """Fills `out` with what `Found.uses` says."""

    def add(self, keys: Vector, member: int, tick: int, /) -> list[int] | None:
        """The bitmaps that keys which had to go named, one for each of them. None: nothing was stored, because a set
        would take a bitmap, and bitmaps are the caller's business. Raises ValueError for a table that is only read."""

    def before_load(self, call: Callable[[], object] | None, /) -> None:
        """To be called before each load of a shared cell of a look-up, so that a test can step in between any two."""

    def before_store(self, call: Callable[[], object] | None, /) -> None:
        """To be called before each store; what it raises ends `add` there, as if the process had died."""
