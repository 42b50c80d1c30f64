"""The reading half of a table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shm.hashtable.layout import (
    COUNT_BITS,
    COUNT_MASK,
    COUNT_UNIT,
    HORIZON,
    WAY_BITS,
    WAYS,
    Table,
    Vector,
    bitmap,
    inline,
)
from shm.segment import Segment

MOST_ASKED = 64
"""Members that the compiled twin is asked for at once."""
MANY = 16
"""Members from which on a set is stored as a vector: 4 us for any number, where one by one takes 0.2 us for each."""

_NOT_ODD, _SHIFT, _WAY = np.int64(-2), np.int64(WAY_BITS), np.int64(WAYS - 1)
_NONE = np.empty(0, dtype=np.int64)


class Found:
    """What a table knows of the keys of a look-up. How often keys are used is looked up when it is asked for."""

    __slots__ = ("_rows", "_skip", "_table", "reach", "tick")

    def __init__(self, table: Table, reach: Vector, rows: Sequence[Vector] | Vector, skip: int = 0) -> None:
        """`rows`: which of the keys were found, where each of them stands, and what its bucket's sequence said then;
        the first `skip` of each row mean nothing."""
        self.reach = reach
        """By member: index behind the last key whose set has it, 0 = none. For all members and perhaps some more."""
        self.tick = table.tick
        """Of the look-up."""
        self._table = table
        self._rows = rows
        self._skip = skip

    def __len__(self) -> int:
        """How many keys were found."""
        return len(self._rows[0]) - self._skip

    @property
    def at(self) -> Vector:
        """Which of the keys were found, rising."""
        return self._rows[0][self._skip :]

    @property
    def places(self) -> Vector:
        return self._rows[1][self._skip :]

    @property
    def moments(self) -> Vector:
        return self._rows[2][self._skip :]

    @property
    def age(self) -> int:
        """Ticks since the last use of the last key found."""
        return max(self.tick - (self._use(-1) >> COUNT_BITS), 0) if len(self) else 0

    def uses(self, which: Vector) -> NDArray[np.float64]:
        """How often these of the keys found were used of late, faded to now. What has moved since counts as unused."""
        table = self._table
        if table._compiled is not None:
            counts = np.empty(len(which))
            table._compiled.uses(self.places, self.moments, which, self.tick, counts)
            return counts
        places = self.places.take(which)
        uses = table._uses.take(places)
        uses *= table._sequence.take(places >> _SHIFT) == self.moments.take(which)
        age = np.maximum(self.tick - (uses >> COUNT_BITS), 0)
        faded: NDArray[np.float64] = np.exp(age * (-1.0 / HORIZON))
        faded *= uses & COUNT_MASK
        faded *= 1.0 / COUNT_UNIT
        return faded

    def _use(self, index: int) -> int:
        """As stored, of the key at that place of the rows; 0 if it has moved."""
        table, place = self._table, self._rows[1].item(index)
        use: int = table._uses.item(place)
        return use if table._sequence.item(place >> WAY_BITS) == self._rows[2].item(index) else 0


class TableReader(Table):
    """For any process. Never waits, never retries, writes nothing."""

    def __init__(self, segment: Segment) -> None:
        super().__init__(segment)
        self._most = self._pool.shape[1] * 64

    def find(self, keys: Vector) -> Found:
        """Those of `keys` that are in the table, and how far the members of their sets reach.

        A key that is being moved at this moment counts as missing.
        """
        reach = np.zeros(self._most, dtype=np.int64)
        if self._compiled is None:
            return self._find(keys, reach)
        count = len(keys)
        out = np.empty((3, count), dtype=np.int64)
        return Found(self, reach, out, count - self._compiled.find(keys, out, reach))

    def reach(self, keys: Vector, members: tuple[int, ...]) -> list[int]:
        """`Found.reach` of these few members (none twice), and nothing else: several times cheaper than `find`.

        Keys are looked up from the last to the first, and no further than to where all of `members` were seen: for
        who has had the whole prompt it takes a look at its last blocks.
        """
        if self._compiled is None or len(members) > MOST_ASKED:
            reach: list[int] = self.find(keys).reach.take(np.array(members, dtype=np.int64)).tolist()
            return reach
        return self._compiled.reach(keys, members)

    def _find(self, keys: Vector, reach: Vector) -> Found:
        """The Python twin: numpy per key, Python per run of equal sets.

        Measured for 512 keys of which 384 are there, in 7 runs: 17 us, of which the probe itself is 6.
        """
        buckets = keys & self._mask
        before = self._sequence.take(buckets)
        # The one place of each key, as an index into all of these rows: keys are never twice in a bucket.
        hits = (self._keys.take(buckets, axis=0) == keys[:, None]).reshape(-1).nonzero()[0]
        if not len(hits):
            return Found(self, reach, (_NONE, _NONE, _NONE))
        at = hits >> _SHIFT
        if len(at) < len(keys):
            buckets, before = buckets.take(at), before.take(at)
        hits &= _WAY
        places = buckets << _SHIFT
        places |= hits
        words = self._members.take(places)
        ends, last = _runs(words)
        sets = {word: inline(word) if word >= 0 else self._pooled(word) for word in last}
        again = self._members.take(places) if min(last) < 0 else words
        after = self._sequence.take(buckets)
        if again.tobytes() != words.tobytes() or (before & _NOT_ODD).tobytes() != after.tobytes():
            # A bitmap may have been another set's when it was loaded, a place another key's.
            stood = (after == before) & (before & 1 == 0) & ((words >= 0) | (again == words))
            if not stood.all():
                at, words, places, before = at[stood], words[stood], places[stood], before[stood]
                if not len(at):
                    return Found(self, reach, (_NONE, _NONE, _NONE))
                ends, last = _runs(words)
        seen = 0
        for end, word in zip(reversed(ends), reversed(last), strict=True):
            _store(reach, sets[word] & ~seen, at.item(end) + 1)
            seen |= sets[word]
        return Found(self, reach, (at, places, before))

    def _pooled(self, word: int) -> int:
        return int.from_bytes(self._pool[bitmap(word)].tobytes(), "little")


def _runs(words: Vector) -> tuple[list[int], list[int]]:
    """Where runs of equal words end, as indexes of their last ones, and the words."""
    ends: list[int] = (words[1:] != words[:-1]).nonzero()[0].tolist()
    ends.append(len(words) - 1)
    return ends, [words.item(end) for end in ends]


def _store(reach: Vector, members: int, stop: int) -> None:
    """`stop` for each bit of `members`."""
    if members.bit_count() > MANY:
        bits = np.frombuffer(members.to_bytes(-(-members.bit_length() // 8), "little"), dtype=np.uint8)
        reach[np.unpackbits(bits, bitorder="little").nonzero()[0]] = stop
        return
    while members:
        low = members & -members
        reach[low.bit_length() - 1] = stop
        members ^= low
