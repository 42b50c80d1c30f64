"""What both halves of a table know: its blocks, and how a set is written as one word."""

from __future__ import annotations

import contextlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shm.compiled import is_wanted
from shm.segment import Block, Segment

compiled: type[Compiled] | None = None
"""The compiled twin of what is done for every prompt; None: there is none, or it is not wanted."""
if is_wanted():
    with contextlib.suppress(ImportError):
        from shm.hashtable._table import Table as Compiled

        compiled = Compiled

WAYS = 8
WAY_BITS = 3
HORIZON = 1024
"""Ticks after which a use counts 1/e."""

MAX_MEMBERS = 0x7FFE
"""Fields hold member + 1, and the highest one must leave a word positive."""

FIELD = 0xFFFF
FIELDS = 4
PLACE_BITS = 16
COUNT_BITS = 24
COUNT_MASK = (1 << COUNT_BITS) - 1
COUNT_UNIT = 256
TICK, STAMP, INSERTED = range(3)

Vector = NDArray[np.int64]


def blocks(capacity: int, members: int, pool: int) -> list[Block]:
    """The blocks of a table for at most `capacity` keys (rounded up to a power of two) and members 0 to `members` - 1.

    `pool` is the number of different sets of more than four members that are kept exactly.
    """
    if not 1 <= members <= MAX_MEMBERS:
        raise ValueError(f"a table has 1 to {MAX_MEMBERS} members, not {members}")
    if not 1 <= pool <= 1 << PLACE_BITS:
        raise ValueError(f"a table has 1 to {1 << PLACE_BITS} pooled sets, not {pool}")
    buckets = 1 << max(0, (-(-capacity // WAYS) - 1).bit_length())
    return [
        Block("cells", (3,), labels=("TICK", "STAMP", "INSERTED")),
        Block("sequence", (buckets,)),
        Block("keys", (buckets, WAYS)),
        Block("members", (buckets * WAYS,)),
        Block("uses", (buckets * WAYS,)),
        Block("pool", (pool, -(-members // 64))),
    ]


class Table:
    def __init__(self, segment: Segment) -> None:
        self._cells = segment.cells("cells")
        self._sequence = segment.array("sequence")
        self._keys = segment.array("keys")
        self._members = segment.array("members")
        self._uses = segment.array("uses")
        self._pool = segment.array("pool")
        self._mask = np.int64(len(self._sequence) - 1)
        self._compiled: Compiled | None = None
        if compiled is not None:
            arrays = self._sequence, self._keys, self._members, self._uses, self._pool
            self._compiled = compiled(segment.array("cells"), *arrays)

    @property
    def tick(self) -> int:
        """The tick of the last use."""
        return self._cells[TICK]

    @property
    def inserted(self) -> int:
        """How many keys have ever taken a place: how far the table has moved on between two moments."""
        return self._cells[INSERTED]

    @property
    def capacity(self) -> int:
        return len(self._members)


def bitmap(word: int) -> int:
    """The place in the pool that a negative word names."""
    return ~word & ((1 << PLACE_BITS) - 1)


@lru_cache(maxsize=4096)
def inline(word: int) -> int:
    """The set in a word that is not negative. Few words are in use at a time: one for each way of sharing."""
    members = 0
    while word:
        field = word & FIELD
        if field:
            members |= 1 << field - 1
        word >>= 16
    return members


def bounds(words: Vector) -> list[int]:
    """Where runs of equal words begin, and the end; there is at least one word."""
    return [0, *((words[1:] != words[:-1]).nonzero()[0] + 1).tolist(), len(words)]
