"""A bounded table from 64-bit keys to sets of small numbers (members): one writer, lock-free vectorised readers.

Keys are hashes, spread evenly, never 0. Every key has one bucket of 16 places and lives nowhere else, so a probe is
one gather, and a deletion cannot break a probe chain: there is none. A full bucket gives up its least recently
used key, so the table never refuses and never grows.

    sequence  (buckets,)      odd while keys of the bucket change
    keys      (buckets, 16)   0 = the place is free
    members   (buckets, 16)   the key's set, one word, see below
    uses      (buckets, 16)   tick of the last use << 24 | how often used of late, in 1/256
    pool      (pool, words)   bitmaps of the sets that a word cannot hold
    cells     TICK, STAMP

A set of up to four members is one word of four 16-bit fields (member + 1, 0 = none), the newest lowest, so that
adding one is a single store. A larger set is a bitmap in the pool, shared by all keys that have the same one: the word
is then negative and holds the bitmap's place and the stamp of its allocation. Keys used together have the same set, in
runs (the blocks of one prompt), and that is how both halves treat them: Python per run, numpy per key. When the
pool is used up, a set keeps its four newest members, and a bitmap that others share stays as it is.

Memory: 24 bytes for a key, 8 for a bucket, `members / 8` for a bitmap. 1,048,576 keys, 1,024 members and 4,096 bitmaps
take 25 MiB.

Ticks. `tick` is the caller's count of uses (not a clock); a key's recent uses fade by a factor e in `HORIZON` ticks.

Order of stores, and what a reader may see if the writer dies behind each:

    a known key gets a member                  a new key
      1  pool bitmap, if one is allocated        1  sequence := odd      the bucket reads as empty until the take-over
      2  members := new word                     2  keys := 0            from here on: the place is free
      3  uses                                    3  members := word
                                                 4  uses
                                                 5  keys := key          from here on: the key with its set
                                                 6  sequence := even     readers see the bucket again

    forgetting a key:  1, 2, 6, and members and uses are left as they are.

Each store covers a vector; dying in the midst of one leaves some keys before it and some behind it. So a key may have
an older set or none, and never another key's. A reader loads in the order sequence, keys, members, pool, members again,
sequence again, and takes a place for empty if its sequence moved or is odd, or its word moved while a bitmap was read:

* without the sequence: (1) the reader finds its key, (2) the writer gives the place to another key and stores that
  one's set, (3) the reader loads the set. Loading the key again is not enough: the first key may be back by then.
* without the stamp: (1) the reader loads a word that names a bitmap, (2) the set shrinks to a word, the bitmap is
  given to another set, (3) the reader loads it. With it, the word can never come back: stamps are not used twice.

A bit set or cleared in a shared bitmap needs no more: it is true of every key that names the bitmap.
These are store-store and load-load orders, which x86-64 keeps (see `shm.fence`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shm.segment import Block, Segment

WAYS = 16
HORIZON = 1024
"""Ticks after which a use counts 1/e."""

MAX_MEMBERS = 0x7FFE
"""Fields hold member + 1, and the highest one must leave a word positive."""

_FIELD = 0xFFFF
_FIELDS = 4
_PLACE_BITS = 16
_COUNT_BITS = 24
_COUNT_MASK = (1 << _COUNT_BITS) - 1
_COUNT_UNIT = 256
_CHUNK = 1 << 16
_TICK, _STAMP = range(2)

Vector = NDArray[np.int64]


class Run(NamedTuple):
    """Keys found one after another that have the same set: those up to index `stop`, after the run before."""

    stop: int
    members: int
    """The set as an integer: bit m is member m."""


class Found(NamedTuple):
    """What a table knows about the leading keys of a look-up."""

    runs: list[Run]
    """Runs of the leading keys that are in the table; none when the first is missing."""
    uses: NDArray[np.float64]
    """How often each of these keys was used of late, faded to now."""


def blocks(capacity: int, members: int, pool: int) -> list[Block]:
    """The blocks of a table for at most `capacity` keys (rounded up to a power of two) and members 0 to `members` - 1.

    `pool` is the number of different sets of more than four members that are kept exactly.
    """
    if not 1 <= members <= MAX_MEMBERS:
        raise ValueError(f"a table has 1 to {MAX_MEMBERS} members, not {members}")
    if not 1 <= pool <= 1 << _PLACE_BITS:
        raise ValueError(f"a table has 1 to {1 << _PLACE_BITS} pooled sets, not {pool}")
    buckets = 1 << max(0, (-(-capacity // WAYS) - 1).bit_length())
    return [
        Block("cells", (2,), labels=("TICK", "STAMP")),
        Block("sequence", (buckets,)),
        Block("keys", (buckets, WAYS)),
        Block("members", (buckets * WAYS,)),
        Block("uses", (buckets * WAYS,)),
        Block("pool", (pool, -(-members // 64))),
    ]


class _Table:
    def __init__(self, segment: Segment) -> None:
        self._cells = segment.cells("cells")
        self._sequence = segment.array("sequence")
        self._keys = segment.array("keys")
        self._members = segment.array("members")
        self._uses = segment.array("uses")
        self._pool = segment.array("pool")
        self._mask = np.int64(len(self._sequence) - 1)

    @property
    def tick(self) -> int:
        """The tick of the last use."""
        return self._cells[_TICK]

    @property
    def capacity(self) -> int:
        return len(self._members)


class TableReader(_Table):
    """The reading half, for any process. Never waits, never retries, writes nothing."""

    def find(self, keys: Vector) -> Found:
        """The leading keys that are in the table, in runs of equal sets, and their recent uses.

        A key that is being moved at this moment counts as missing.
        """
        if not len(keys):
            return Found([], np.empty(0))
        buckets = keys & self._mask
        before = self._sequence.take(buckets)
        rows = self._keys.take(buckets, axis=0)
        # The one place of each key, as an index into all of `rows`: keys are never twice in a bucket.
        hits = (rows == keys[:, None]).reshape(-1).nonzero()[0]
        if len(hits) < len(keys):
            count = _leading(hits >> 4)
            if not count:
                return Found([], np.empty(0))
            hits, buckets, before = hits[:count], buckets[:count], before[:count]
        places = (buckets << 4) + (hits & (WAYS - 1))
        words = self._members.take(places)
        uses = self._uses.take(places)
        runs = [Run(stop, self._set(int(words[start]))) for start, stop in pairwise(_bounds(words))]
        again = self._members.take(places)  # a bitmap may have been another set's when it was loaded
        moved = (self._sequence.take(buckets) ^ before) | (before & 1) | ((again ^ words) & words >> 63)
        if moved.any():
            runs = _cut(runs, int((moved != 0).argmax()))
        count = runs[-1].stop if runs else 0
        return Found(runs, self._faded(uses[:count]))

    def _set(self, word: int) -> int:
        if word >= 0:
            return _inline(word)
        return int.from_bytes(self._pool[_place(word)].tobytes(), "little")

    def _faded(self, uses: Vector) -> NDArray[np.float64]:
        age = np.maximum(self.tick - (uses >> _COUNT_BITS), 0)
        faded: NDArray[np.float64] = np.exp(age * (-1.0 / HORIZON)) * ((uses & _COUNT_MASK) * (1.0 / _COUNT_UNIT))
        return faded


class TableWriter(_Table):
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
        """`member` is in the set of each of `keys`, all of which are used at `tick` (which never falls)."""
        self._put(self._cells, _TICK, tick)
        while len(keys):
            keys = self._add(keys, member, tick)

    def _add(self, keys: Vector, member: int, tick: int) -> Vector:
        """One round of `add`; returns the keys that must wait for the next one."""
        buckets = keys & self._mask
        hits = np.flatnonzero(self._keys.take(buckets, axis=0) == keys[:, None])
        if len(hits):
            index = hits >> 4
            places = (buckets.take(index) << 4) + (hits & (WAYS - 1))
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
        places = (buckets << 4) + uses.argmin(axis=1)
        sequence = self._sequence.take(buckets)
        self._release(places)
        self._put(self._sequence, buckets, sequence + 1)
        self._put(self._flat, places, 0)
        self._put(self._members, places, member + 1)
        self._put(self._uses, places, tick << _COUNT_BITS | _COUNT_UNIT)
        self._put(self._flat, places, keys)
        self._put(self._sequence, buckets, sequence + 2)

    def _use(self, places: Vector, tick: int) -> None:
        uses = self._uses.take(places)
        age = tick - (uses >> _COUNT_BITS)
        counts = np.exp(age * (-1.0 / HORIZON)) * (uses & _COUNT_MASK)
        counts += _COUNT_UNIT
        np.minimum(counts, _COUNT_MASK, out=counts)
        self._put(self._uses, places, counts.astype(np.int64) | (tick << _COUNT_BITS))

    def _join(self, places: Vector, member: int) -> None:
        words = self._members.take(places)
        for start, stop in pairwise(_bounds(words)):
            word = int(words[start])
            if word < 0:
                joined = self._join_bitmap(word, stop - start, member)
            else:
                joined = self._join_word(word, stop - start, member)
            if joined != word:
                self._put(self._members, places[start:stop], joined)

    def _join_word(self, word: int, keys: int, member: int) -> int:
        fields = [field for shift in range(0, 16 * _FIELDS, 16) if (field := word >> shift & _FIELD)]
        if member + 1 in fields:
            return word
        if len(fields) == _FIELDS and self._free:
            return self._allocate(_inline(word) | 1 << member, keys)
        return sum(field << 16 * i for i, field in enumerate([member + 1, *fields][:_FIELDS]))

    def _join_bitmap(self, word: int, keys: int, member: int) -> int:
        place = _place(word)
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
        stamp = self._cells[_STAMP] + 1
        self._put(self._cells, _STAMP, stamp)  # first, so that no successor can use it again
        words = self._pool.shape[1]
        self._put(self._pool, place, np.frombuffer(members.to_bytes(words * 8, "little"), dtype=np.int64))
        return ~(stamp << _PLACE_BITS | place)

    def _release(self, places: Vector) -> None:
        """The sets at `places` are about to go: give back what no key names any more.

        Called before the words are replaced; nothing is allocated until they are.
        """
        words = self._members.take(places)
        if words.min() >= 0:
            return
        named = (words < 0) & (self._flat.take(places) != 0)
        gone, counts = np.unique(~words[named] & ((1 << _PLACE_BITS) - 1), return_counts=True)
        for place, count in zip(gone.tolist(), counts.tolist(), strict=True):
            self._holders[place] -= count
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
        leaving = np.zeros(_FIELD + 1, dtype=np.bool_)
        leaving[np.array(members, dtype=np.int64) + 1] = True
        self._leave_pool(members)
        for start in range(0, self.capacity, _CHUNK):
            empty = np.flatnonzero(~self._pool.any(axis=1))
            words = self._members[start : start + _CHUNK]
            kept = words
            for shift in range(0, 16 * _FIELDS, 16):
                mine = leaving[words >> shift & _FIELD] & (words > 0)
                if mine.any():
                    kept = kept - np.where(mine, (words >> shift & _FIELD) << shift, 0)
            changed = np.flatnonzero(kept != words) + start
            if len(changed):
                self._put(self._members, changed, kept[changed - start])
            gone = kept == 0
            if len(empty):
                gone |= (kept < 0) & np.isin(~kept & ((1 << _PLACE_BITS) - 1), empty)
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
            old = self._uses[start : start + _CHUNK] >> _COUNT_BITS < tick
            yield self._remove(np.flatnonzero(old) + start)

    def expire(self, tick: int) -> int:
        """`expiring`, at once; returns how many keys were dropped."""
        return sum(self.expiring(tick))

    def _remove(self, places: Vector) -> int:
        places = places[self._flat.take(places) != 0]
        if not len(places):
            return 0
        self._release(places)
        buckets = np.unique(places >> 4)
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
        used = ~words[words < 0] & ((1 << _PLACE_BITS) - 1)
        self._holders: list[int] = np.bincount(used, minlength=len(self._pool)).tolist()
        """How many keys name each bitmap; private to the writer, rebuilt from the words."""
        self._free = [place for place, holders in enumerate(self._holders) if not holders]

    def __len__(self) -> int:
        """Keys in the table."""
        return int(np.count_nonzero(self._keys))

    def _put(self, cells: NDArray[np.int64] | memoryview, where: object, value: object) -> None:
        """Every store to shared memory, so that a test can stop the writer at each."""
        cells[where] = value  # type: ignore[call-overload]  # one line for cells, rows, vectors


def _place(word: int) -> int:
    return ~word & ((1 << _PLACE_BITS) - 1)


def _inline(word: int) -> int:
    members = 0
    while word:
        field = word & _FIELD
        if field:
            members |= 1 << field - 1
        word >>= 16
    return members


def _bounds(words: Vector) -> list[int]:
    """Where runs of equal words begin, and the end."""
    return [0, *((words[1:] != words[:-1]).nonzero()[0] + 1).tolist(), len(words)]


def _leading(found: Vector) -> int:
    """How many of 0, 1, 2, ... stand at the beginning of the rising vector `found`."""
    count = len(found)
    if not count or found[0]:
        return 0
    if found[-1] == count - 1:
        return count
    return int((found != np.arange(count)).argmax())


def _cut(runs: list[Run], count: int) -> list[Run]:
    kept: list[Run] = []
    for run in runs:
        if run.stop >= count:
            if count > (kept[-1].stop if kept else 0):
                kept.append(Run(count, run.members))
            break
        kept.append(run)
    return kept
