"""The compiled twins of single cells, gauges and the fence; `_cells.c` has the reasons."""

from collections.abc import Callable

from shm.cells import Cells as CellsLike
from shm.cells import Vector

class Cells:
    """The int64 cells of a buffer, one at a time: what a `memoryview` of them does, several times faster. Loads
    acquire, stores release. Raises ValueError for a buffer of anything else, and for any access once released."""

    def __init__(self, buffer: memoryview, /) -> None: ...
    def __getitem__(self, index: int, /) -> int: ...
    def __setitem__(self, index: int, value: int, /) -> None: ...
    def __len__(self) -> int: ...
    def release(self) -> None: ...

class Gauges:
    """As `shm.cells.Gauges`; `used` is not looked at."""

    def __init__(self, block: Vector, rows: memoryview, used: CellsLike, /) -> None: ...
    def one(self, finished: int, started: int, index: int, /) -> int: ...
    def few(self, finished: int, started: int, indices: tuple[int, ...], /) -> tuple[int, ...]: ...
    def many(self, finished: int, started: int, indices: Vector, out: Vector, /) -> None: ...
    def before_load(self, call: Callable[[], object] | None, /) -> None:
        """To be called before each load of a counter, so that a test can step in between any two."""

def add(cells: CellsLike, /, *pairs: int) -> None:
    """`shm.cells.add`."""

def full() -> None:
    """`shm.fence.full`."""
