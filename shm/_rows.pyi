"""The compiled twin of `shm.seqlock.Snapshot`; `_rows.c` has the reasons."""

from collections.abc import Callable

from shm.cells import Vector

class Snapshot:
    """As `shm.seqlock.Snapshot`. Raises ValueError for arrays that do not fit together."""

    def __init__(self, sequence: Vector, shared: Vector, copied: Vector, values: Vector, /) -> None: ...
    def renew(self, used: int, /) -> tuple[int, int]: ...
    def before_load(self, call: Callable[[], object] | None, /) -> None:
        """To be called before each load of a shared cell, so that a test can step in between any two."""
