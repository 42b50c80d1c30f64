"""The writing half of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shm.hashtable.layout import (
    COUNT_BITS,
    COUNT_MASK,
    COUNT_UNIT,
    FIELD,
    FIELDS,
    HORIZON,
    INSERTED,
    PLACE_BITS,
    STAMP,
    TICK,
    WAY_BITS,
    WAYS,
    Table,
    Vector,
    bitmap,
    bounds,
    inline,
)
from shm.segment import Segment

_CHUNK = 1 << 16


class TableWriter(Table):
    """The writing half; exactly one process has one, and only after its predecessor is dead."""

    def __init__(self, segment: Segment) -> None:
        super().__init__(segment)
        self._flat = self._keys.reshape(-1)
        # Private scratch: who claims a bucket. Keys of one batch that meet in a bucket are placed one after another,
        # each against what the one before it left.
        self._claims = np.zeros(len(self._sequence), dtype=np.int64)
        self._numbers = np.arange(256, dtype=np.int64)
        self._take_over()

    # -- changing -----------------------------------------------------------------------------------------------

    def add(self, keys: Vector, member: int, tick: int) -> None:
        """`member` is in the set of each of `keys`, none twice, all used at `tick` (which never falls)."""
        self._put(self._cells, TICK, tick)
        if self._compiled is not None:
            released = self._compiled.add(keys, member, tick)
            if released is not None:
                for place in released:
                    self._let_go(place, 1)
                return
        while len(keys):
            keys = self._add(keys, member, tick)

    def _add(self, keys: Vector, member: int, tick: int) -> Vector:
        """One round of `add`; returns the keys that must wait for the next one."""
        buckets = keys & self._mask
        hits = np.flatnonzero(self._keys.take(buckets, axis=0) == keys[:, None])
        if len(hits):
            index = hits >> WAY_BITS
            places = (buckets.take(index) << WAY_BITS) + (hits & (WAYS - 1))
            self._join(places, member)
            self._use(places, tick)
            if len(hits) == len(keys):
                return keys[:0]
            missing = np.ones(len(keys), dtype=np.bool_)
            missing[index] = False
            keys, buckets = keys[missing], buckets[missing]
        count = len(keys)
        if count > len(self._numbers):
            self._numbers = np.arange(2 * count, dtype=np.int64)
        numbers = self._numbers[:count]
        claims = self._claims
        claims[buckets] = numbers
        first: NDArray[np.bool_] = claims.take(buckets) == numbers
        if first.all():
            self._insert(keys, buckets, member, tick)
            return keys[:0]
        self._insert(keys[first], buckets[first], member, tick)
        later: Vector = keys[~first]
        return later

    def _insert(self, keys: Vector, buckets: Vector, member: int, tick: int) -> None:
        """New keys, at most one for a bucket; each takes a free place or the least recently used one."""
        table = self._keys.take(buckets, axis=0)
        uses = self._uses.reshape(-1, WAYS).take(buckets, axis=0)
        uses *= table != 0
        places = (buckets << WAY_BITS) + uses.argmin(axis=1)
        sequence = self._sequence.take(buckets)
        self._put(self._cells, INSERTED, self._cells[INSERTED] + len(keys))
        self._release(places)
        self._put(self._sequence, buckets, sequence + 1)
        self._put(self._flat, places, 0)
        self._put(self._members, places, member + 1)
        self._put(self._uses, places, tick << COUNT_BITS | COUNT_UNIT)
        self._put(self._flat, places, keys)
        self._put(self._sequence, buckets, sequence + 2)

    def _use(self, places: Vector, tick: int) -> None:
        uses = self._uses.take(places)
        age = tick - (uses >> COUNT_BITS)
        counts = np.exp(age * (-1.0 / HORIZON)) * (uses & COUNT_MASK)
        counts += COUNT_UNIT
        np.minimum(counts, COUNT_MASK, out=counts)
        self._put(self._uses, places, counts.astype(np.int64) | (tick << COUNT_BITS))

    def _join(self, places: Vector, member: int) -> None:
        words = self._members.take(places)
        for start, stop in pairwise(bounds(words)):
            word = int(words[start])
            if word < 0:
                joined = self._join_bitmap(word, stop - start, member)
            else:
                joined = self._join_word(word, stop - start, member)
            if joined != word:
                self._put(self._members, places[start:stop], joined)

    def _join_word(self, word: int, keys: int, member: int) -> int:
        fields = [field for shift in range(0, 16 * FIELDS, 16) if (field := word >> shift & FIELD)]
        if member + 1 in fields:
            return word
        if len(fields) == FIELDS and self._free:
            return self._allocate(inline(word) | 1 << member, keys)
        return sum(field << 16 * i for i, field in enumerate([member + 1, *fields][:FIELDS]))

    def _join_bitmap(self, word: int, keys: int, member: int) -> int:
        place = bitmap(word)
        row = self._pool[place]
        bit = np.int64(1) << np.int64(member & 63)
        if row[member >> 6] & bit:
            return word
        if self._holders[place] == keys:  # nobody else has this set
            self._put(row, member >> 6, row[member >> 6] | bit)
            return word
        if not self._free:
            return word
        self._holders[place] -= keys
        return self._allocate(int.from_bytes(row.tobytes(), "little") | 1 << member, keys)

    def _allocate(self, members: int, keys: int) -> int:
        """A word for `keys` keys that share a new bitmap."""
        place = self._free.pop()
        self._holders[place] = keys
        stamp = self._cells[STAMP] + 1
        self._put(self._cells, STAMP, stamp)  # first, so that no successor can use it again
        words = self._pool.shape[1]
        self._put(self._pool, place, np.frombuffer(members.to_bytes(words * 8, "little"), dtype=np.int64))
        return ~(stamp << PLACE_BITS | place)

    def _release(self, places: Vector) -> None:
        """The sets at `places` are about to go: give back what no key names any more.

        Called before the words are replaced; nothing is allocated until they are.
        """
        words = self._members.take(places)
        if words.min() >= 0:
            return
        named = (words < 0) & (self._flat.take(places) != 0)
        gone, counts = np.unique(~words[named] & ((1 << PLACE_BITS) - 1), return_counts=True)
        for place, count in zip(gone.tolist(), counts.tolist(), strict=True):
            self._let_go(place, count)

    def _let_go(self, place: int, keys: int) -> None:
        """So many keys no longer name the bitmap."""
        self._holders[place] -= keys
        if not self._holders[place]:
            self._free.append(place)

    # -- forgetting ---------------------------------------------------------------------------------------------

    def forgetting(self, members: Iterable[int]) -> Iterator[None]:
        """Take `members` out of every set; a key whose set becomes empty goes.

        One pass over the table however many they are, 50 ms for a million keys: forget together what leaves together.
        In steps of a few milliseconds, so that the caller's loop can do other things in between: anything but adding
        one of `members`.
        """
        members = list(members)
        leaving = np.zeros(FIELD + 1, dtype=np.bool_)
        leaving[np.array(members, dtype=np.int64) + 1] = True
        self._leave_pool(members)
        for start in range(0, self.capacity, _CHUNK):
            empty = np.flatnonzero(~self._pool.any(axis=1))
            words = self._members[start : start + _CHUNK]
            kept = words
            for shift in range(0, 16 * FIELDS, 16):
                mine = leaving[words >> shift & FIELD] & (words > 0)
                if mine.any():
                    kept = kept - np.where(mine, (words >> shift & FIELD) << shift, 0)
            changed = np.flatnonzero(kept != words) + start
            if len(changed):
                self._put(self._members, changed, kept[changed - start])
            gone = kept == 0
            if len(empty):
                gone |= (kept < 0) & np.isin(~kept & ((1 << PLACE_BITS) - 1), empty)
            self._remove(np.flatnonzero(gone) + start)
            yield
        # A word that grew into a bitmap before its turn came has taken its members along.
        self._leave_pool(members)

    def forget(self, members: Iterable[int]) -> None:
        """`forgetting`, at once."""
        for _ in self.forgetting(members):
            pass

    def _leave_pool(self, members: Iterable[int]) -> None:
        for member in members:
            column = self._pool[:, member >> 6]
            self._put(self._pool, (slice(None), member >> 6), column & ~(np.int64(1) << np.int64(member & 63)))

    def expiring(self, tick: int) -> Iterator[int]:
        """Drop every key that was last used before `tick`, in steps as `forgetting`; yields how many each dropped."""
        for start in range(0, self.capacity, _CHUNK):
            old = self._uses[start : start + _CHUNK] >> COUNT_BITS < tick
            yield self._remove(np.flatnonzero(old) + start)

    def expire(self, tick: int) -> int:
        """`expiring`, at once; returns how many keys were dropped."""
        return sum(self.expiring(tick))

    def _remove(self, places: Vector) -> int:
        places = places[self._flat.take(places) != 0]
        if not len(places):
            return 0
        self._release(places)
        buckets = np.unique(places >> WAY_BITS)
        sequence = self._sequence.take(buckets)
        self._put(self._sequence, buckets, sequence + 1)
        self._put(self._flat, places, 0)
        self._put(self._sequence, buckets, sequence + 2)
        return len(places)

    # -- taking over --------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Make whole what a dead writer left, and find out which bitmaps are in use."""
        odd = np.flatnonzero(self._sequence & 1)
        if len(odd):
            self._put(self._sequence, odd, self._sequence.take(odd) + 1)
        words = self._members[self._flat != 0]
        used = ~words[words < 0] & ((1 << PLACE_BITS) - 1)
        self._holders: list[int] = np.bincount(used, minlength=len(self._pool)).tolist()
        """How many keys name each bitmap; private to the writer, rebuilt from the words."""
        self._free = [place for place, holders in enumerate(self._holders) if not holders]

    def __len__(self) -> int:
        """Keys in the table."""
        return int(np.count_nonzero(self._keys))

    def _put(self, cells: NDArray[np.int64] | memoryview, where: object, value: object) -> None:
        """Every store to shared memory, so that a test can stop the writer at each."""
        cells[where] = value  # type: ignore[call-overload]  # one line for cells, rows, vectors
