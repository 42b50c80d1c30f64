"""The compiled twin of `TableReader.find`; `_table.c` has the reasons."""

from collections.abc import Callable

from shm.hashtable.layout import Vector

class Table:
    """Holds the arrays of one table. Raises ValueError when they do not fit together."""

    def __init__(self, sequence: Vector, keys: Vector, members: Vector, uses: Vector, pool: Vector, /) -> None: ...
    def find(self, keys: Vector, out: Vector, reach: Vector, /) -> int:
        """How many keys were found. Which ones, and their uses, stand at the ends of the two rows of `out`, each as
        long as `keys`; `reach`, zeroed before, is what `Found.reach` says."""

    def before_load(self, call: Callable[[], object] | None, /) -> None:
        """To be called before each load of a shared cell, so that a test can step in between any two."""
