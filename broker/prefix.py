"""The shared prefix index: which instance has been sent which beginnings of prompts.

A prompt is cut into full blocks; block k's key is a 64-bit hash of everything up to and with block k, so that equal
keys mean equal prefixes, and "who has seen the first k blocks" is one look-up per block, all of them at once.

    frontend   PrefixIndex    text -> keys -> Match       note() -> Overlay + outbox -> RoutingNotices (control.sock)
    scheduler  PrefixWriter   RoutingNotices -> shm.hashtable; forgets instances, ages

The index remembers what was *sent*; what an engine has evicted since it is not told. A frontend sees its own notices at
once, through the overlay, and others' when the scheduler has applied them. Notices may be lost (a full socket, a
scheduler that is away): then a prefix is forgotten or counted less, nothing else. Nobody ever waits for one.

Segment `prefix` (writer: scheduler): the blocks of `shm.hashtable`, and

    generations  (slots,)      the generation of each slot that the index knows; 0 = none, -1 = being forgotten
    applied      (frontends,)  number of the last notice applied from each frontend: what its overlay may forget
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.config import Config
from broker.errors import WireError
from broker.types import RouteRequest
from broker.wire import RoutingNotices
from shm.hashtable import HORIZON, TableReader, TableWriter, blocks
from shm.segment import Block, Layout, Segment

PREFIX = "prefix"
"""File name in the run directory."""
CAPACITY = 1 << 20
"""Blocks remembered; 25 MiB in all with 1,024 slots."""
POOL = 4096
"""Different sets of more than four instances that are kept exactly."""
BLOCKS = 1024
"""Blocks of one prompt that count; the rest of it is as if it were new."""

BATCH_BYTES = 48 * 1024
"""Keys in one message to the scheduler."""
BATCH_NOTICES = 64
"""Notices in one message: each costs the scheduler some 30 us, however short it is."""
OUTBOX_BYTES = 1024 * 1024
"""Keys that may wait to be sent; beyond, the oldest notices are lost."""
LEAVING = -1
"""Instead of a generation: the slot is being forgotten. Without it, a scheduler killed within a pass would leave the
rest of it to the slot's next instance."""
PENDING = 128
"""Own notices that the overlay keeps while they are not applied."""

Vector = NDArray[np.int64]
Words = NDArray[np.uint64]
Kind = Literal["text", "token"]


# -- keys --------------------------------------------------------------------------------------------------


def _constants(name: str, count: int) -> Words:
    """Odd numbers that are the same in every process."""
    data = hashlib.shake_128(f"penstock prefix {name}".encode()).digest(8 * count)
    return np.frombuffer(data, dtype="<u8").astype(np.uint64) | np.uint64(1)


_BEFORE, _AFTER = _constants("before", 512), _constants("after", 512)
_POSITIONS = np.arange(1, BLOCKS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
_A, _B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S32 = (np.uint64(shift) for shift in (27, 30, 31, 32))


@lru_cache(maxsize=1024)
def namespace(model: str, block: int, kind: Kind) -> np.uint64:
    """Where the chains of a model begin.

    Keys of different namespaces are equal only by chance, so text blocks, token blocks and an engine's own blocks of
    another size live side by side in one table.
    """
    digest = hashlib.blake2b(f"{kind}/{block}/{model}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def text_keys(text: str, block: int, start: np.uint64, limit: int = BLOCKS) -> Vector:
    """The keys of the full blocks of `block` characters (code points), at most `limit`.

    A block hashes alike whatever else is in its prompt: a prompt in ASCII and one that goes on in Chinese share the
    blocks they share.
    """
    count = min(len(text) // block, limit)
    if not count:
        return np.empty(0, dtype=np.int64)
    text = text[: count * block]
    if text.isascii():
        return _chain(_narrow(np.frombuffer(text.encode("ascii"), dtype=np.uint8).reshape(count, block)), start)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).reshape(count, block)
    hashes = _wide(points)
    plain = np.flatnonzero((points < 128).all(axis=1))
    hashes[plain] = _narrow(points[plain].astype(np.uint8))
    return _chain(hashes, start)


def token_keys(tokens: Sequence[int] | Vector, block: int, start: np.uint64, limit: int = BLOCKS) -> Vector:
    """The keys of the full blocks of `block` token ids, at most `limit`."""
    count = min(len(tokens) // block, limit)
    if not count:
        return np.empty(0, dtype=np.int64)
    ids = np.asarray(tokens[: count * block], dtype=np.int64).astype(np.uint32)
    return _chain(_wide(ids.reshape(count, block)), start)


def _narrow(rows: NDArray[np.uint8]) -> Words:
    """A hash of each row of bytes."""
    return _mixed(_packed(rows, 8), _BEFORE, _AFTER)


def _wide(rows: NDArray[np.uint32]) -> Words:
    """A hash of each row of 32-bit numbers."""
    return _mixed(_packed(rows, 2), _AFTER, _BEFORE)


def _packed(rows: NDArray[np.uint8] | NDArray[np.uint32], per_word: int) -> Words:
    count, width = rows.shape
    rest = -width % per_word
    if rest:
        padded = np.zeros((count, width + rest), dtype=rows.dtype)
        padded[:, :width] = rows
        rows = padded
    return np.ascontiguousarray(rows).view(np.uint64)


def _mixed(words: Words, before: Words, after: Words) -> Words:
    """A weighted sum of each row.

    The weights alone would not do: a multiplication carries upwards only, so of differences in the highest bytes of
    two words only their lowest bits would be told apart. Hence the fold in between.

    Measured for 512 blocks of 64 bytes: 10 us; one xxh3 per block, from Python, 16 to 25.
    """
    width = words.shape[1]
    if width > len(before):  # blocks longer than 4 KiB: in pieces
        pieces = range(0, width, len(before))
        parts = [_mixed(words[:, at : at + len(before)], before, after) for at in pieces]
        return _mixed(np.stack(parts, axis=1), after, before)
    mixed = words * before[:width]
    mixed ^= mixed >> _S32
    hashes: Words = np.einsum("ij,j->i", mixed, after[:width])
    return hashes


def _chain(hashes: Words, start: np.uint64) -> Vector:
    """Key k: the sum of the first k blocks' hashes, each mixed with its position, from `start` on."""
    count = len(hashes)
    mixed = hashes + (_POSITIONS[:count] if count <= BLOCKS else _positions(count))
    mixed ^= mixed >> _S30
    mixed *= _A
    mixed ^= mixed >> _S27
    mixed *= _B
    mixed ^= mixed >> _S31
    mixed[:1] += start  # as a vector: it may wrap around
    keys: Vector = np.cumsum(mixed, out=mixed).view(np.int64)
    keys[keys == 0] = 1  # 0 is the table's word for nothing
    return keys


def _positions(count: int) -> Words:
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


# -- what a prompt meets -----------------------------------------------------------------------------------


class Match(msgspec.Struct, frozen=True, gc=False):
    """What the index knows of one prompt, at one moment."""

    keys: Vector
    """One per full block, at most the cap."""
    blocks: float
    """Length of the whole prompt in blocks; the last one need not be full, and the cap does not count."""
    depths: Vector
    """By slot: how many leading blocks the instance has been sent, without a hole."""
    uses: NDArray[np.float64]
    """How many recent requests began with the first block, the first two, ...; shorter than `keys` when deeper ones are
    unknown. Recent: of the last `shm.hashtable.HORIZON` or so, older ones fading."""
    requests: float
    """How many recent requests there were at all, faded alike."""

    def cached(self, prompt_tokens: int) -> dict[int, int]:
        """Tokens of a prompt of that many that instances have been sent, by slot; who has none of it is left out."""
        per_block = prompt_tokens / max(self.blocks, 1.0)
        slots = self.depths.nonzero()[0].tolist()
        return {slot: round(min(per_block * self.depths.item(slot), prompt_tokens)) for slot in slots}


class _Notice(NamedTuple):
    number: int
    keys: Vector
    slot: int
    generation: int


class PrefixIndex:
    """A frontend's half: looks up prompts, and notes where they were sent. Reads shared memory, never writes it."""

    def __init__(self, segment: Segment, frontend: int, *, block: int = 64, limit: int = BLOCKS) -> None:
        self._table = TableReader(segment)
        self._generations = segment.cells("generations")
        self._applied = segment.cells("applied")
        self._frontend = frontend
        self.block = block
        """Characters, or token ids, of a block."""
        self._limit = limit
        self._number = self._applied[frontend]
        self._pending: deque[_Notice] = deque(maxlen=PENDING)
        self._outbox: deque[_Notice] = deque()
        self._outbox_keys = 0
        self._last: tuple[RouteRequest | None, Vector, float] = (None, np.empty(0, dtype=np.int64), 0.0)
        self._matched: Match | None = None
        """Of the last request."""
        self.lost = 0
        """Notices given up because the scheduler did not take them in time."""
        self.on_note: Callable[[], None] = lambda: None
        """Hears that there is something to tell."""

    @classmethod
    def attach(
        cls, run_dir: Path, layout: Layout, frontend: int, *, block: int = 64, limit: int = BLOCKS
    ) -> PrefixIndex:
        """Map the run's index, read-only. Raises SegmentError."""
        return cls(Segment.attach(run_dir / PREFIX, layout), frontend, block=block, limit=limit)

    @classmethod
    def of_run(cls, run_dir: Path, config: Config, frontend: int) -> PrefixIndex:
        """As these settings ask for. Raises SegmentError."""
        block, limit = config.scheduler.cache_block_size, config.scheduler.prefix_blocks_per_prompt
        return cls.attach(run_dir, run_layout(config), frontend, block=block, limit=limit)

    def match(self, request: RouteRequest) -> Match:
        """What is known of the request's prompt. The keys of the last request are kept: it may be picked for again."""
        if not self._is_last(request):
            self._last = (request, *self._keys(request))
        _, keys, blocks = self._last
        depths = np.zeros(len(self._generations), dtype=np.int64)
        found = self._table.find(keys)
        uses = found.uses
        if found.runs:
            alive = found.runs[0].members
            start = 0
            for run in found.runs:
                _store(depths, alive & ~run.members, start)
                alive &= run.members
                start = run.stop
            _store(depths, alive, start)
        requests = HORIZON * -np.expm1(-self._table.tick / HORIZON)
        if len(keys):
            uses = self._overlay(keys, depths, uses)
        self._matched = Match(keys, blocks, depths, uses, float(requests) + len(self._pending))
        return self._matched

    def matched(self, request: RouteRequest) -> Match:
        """What `match` said of the request, if it is the last one; else what it says now."""
        return self._matched if self._matched is not None and self._is_last(request) else self.match(request)

    def _is_last(self, request: RouteRequest) -> bool:
        """Whether it has the last one's prompt; the legs of a pair do."""
        last = self._last[0]
        return last is not None and (
            request is last
            or (request.prompt is last.prompt and request.prompt_ids is last.prompt_ids and request.model == last.model)
        )

    def _keys(self, request: RouteRequest) -> tuple[Vector, float]:
        model = request.model or ""
        if request.prompt_ids:
            start = namespace(model, self.block, "token")
            keys = token_keys(request.prompt_ids, self.block, start, self._limit)
            return keys, len(request.prompt_ids) / self.block
        start = namespace(model, self.block, "text")
        return text_keys(request.prompt, self.block, start, self._limit), len(request.prompt) / self.block

    def _overlay(self, keys: Vector, depths: Vector, uses: NDArray[np.float64]) -> NDArray[np.float64]:
        """Adds the own notices that the scheduler has not applied yet."""
        pending = self._pending
        applied = self._applied[self._frontend]
        while pending and pending[0].number <= applied:
            pending.popleft()
        first = keys[0]
        for notice in pending:
            if notice.keys[0] != first or self._generations[notice.slot] != notice.generation:
                continue
            shared = min(len(keys), len(notice.keys))
            apart = np.flatnonzero(keys[:shared] != notice.keys[:shared])
            depth = int(apart[0]) if len(apart) else shared
            if depth > len(uses):
                uses = np.concatenate((uses, np.zeros(depth - len(uses))))
            uses[:depth] += 1.0
            if depth > depths[notice.slot]:
                depths[notice.slot] = depth
        return uses

    def note(self, match: Match, slot: int) -> None:
        """The prompt goes to `slot`: seen by this frontend at once, by the others when a batch has been applied."""
        if not len(match.keys):
            return
        self._number += 1
        notice = _Notice(self._number, match.keys, slot, self._generations[slot])
        self._pending.append(notice)
        self._outbox.append(notice)
        self._outbox_keys += len(notice.keys)
        while self._outbox_keys * 8 > OUTBOX_BYTES:
            self._outbox_keys -= len(self._outbox.popleft().keys)
            self.lost += 1
        self.on_note()

    def batch(self) -> RoutingNotices | None:
        """The next message to the scheduler; None when there is nothing to tell.

        Called every few milliseconds while there is something, and sent without waiting; it need not arrive.
        """
        batch: list[_Notice] = []
        size = 0
        while (
            self._outbox
            and len(batch) < BATCH_NOTICES
            and (size := size + 8 * len(self._outbox[0].keys)) <= BATCH_BYTES
        ):
            batch.append(self._outbox.popleft())
        if not batch:
            return None
        self._outbox_keys -= sum(len(notice.keys) for notice in batch)
        return RoutingNotices(
            self._frontend,
            batch[-1].number,
            [notice.slot for notice in batch],
            [notice.generation for notice in batch],
            [len(notice.keys) for notice in batch],
            np.concatenate([notice.keys for notice in batch]).tobytes(),
        )


def _store(depths: Vector, members: int, depth: int) -> None:
    """`depth` for each bit of `members`."""
    while members:
        low = members & -members
        depths[low.bit_length() - 1] = depth
        members ^= low


# -- the scheduler's half ----------------------------------------------------------------------------------


def prefix_layout(slots: int, frontends: int, capacity: int = CAPACITY) -> Layout:
    """`capacity` blocks, rounded up to a power of two."""
    return Layout(
        PREFIX,
        1,
        [
            *blocks(capacity, slots, POOL),
            Block("generations", (slots,)),
            Block("applied", (frontends,)),
        ],
    )


def run_layout(config: Config) -> Layout:
    """The layout that these settings ask for."""
    return prefix_layout(config.shm.slots, config.shm.frontends, config.scheduler.prefix_blocks)


def create_prefix(run_dir: Path, layout: Layout) -> None:
    """Make the segment in the run directory. Raises SegmentError; SegmentSpace when the mount is too small."""
    Segment.create(run_dir / PREFIX, layout).close()


class PrefixWriter:
    """The scheduler's half, without sockets or clock. Exactly one process has one.

    `generations` says who has which slot at this moment (the load table's). What the index holds of other generations
    is forgotten, so a scheduler that takes over needs no more than this.
    """

    def __init__(self, segment: Segment, generations: Mapping[int, int]) -> None:
        self._table = TableWriter(segment)
        self._generations = segment.cells("generations")
        self._applied = segment.cells("applied")
        self._marks: deque[tuple[float, int]] = deque()
        known = enumerate(self._generations.tolist())
        self.forget([slot for slot, generation in known if generation != generations.get(slot, 0)])
        for slot, generation in generations.items():
            self._generations[slot] = generation

    @classmethod
    def attach(cls, run_dir: Path, layout: Layout, generations: Mapping[int, int]) -> PrefixWriter:
        """Map the run's index, writable, and take it over. Raises SegmentError."""
        segment = Segment.attach(run_dir / PREFIX, layout, writable=True)
        segment.take_over(os.getpid())
        return cls(segment, generations)

    def generation(self, slot: int) -> int:
        """Whose notices count for the slot; 0 = nobody's."""
        generation: int = self._generations[slot]
        return generation

    def admit(self, slot: int, generation: int) -> None:
        """`slot` is another instance's from now on."""
        if self._generations[slot] != generation:
            self.forget([slot])
            self._generations[slot] = generation

    def forget(self, slots: Iterable[int]) -> None:
        """The instances in `slots` are removed: `forgetting`, at once."""
        for _ in self.forgetting(slots):
            pass

    def forgetting(self, slots: Iterable[int]) -> Iterator[None]:
        """The instances in `slots` are removed. One pass over the table for all of them, tens of milliseconds, in steps
        of a few; batches may be applied in between, but none of `slots` admitted before the last step."""
        slots = [slot for slot in slots if self._generations[slot]]
        if not slots:
            return
        for slot in slots:
            self._generations[slot] = LEAVING  # first: nothing notes the slot from here on
        yield from self._table.forgetting(slots)
        for slot in slots:
            self._generations[slot] = 0

    def apply(self, notices: RoutingNotices) -> int:
        """Enter one batch; returns how many notices counted. Those of another generation do not.

        Raises WireError, with nothing entered, when the message contradicts itself.
        """
        lengths = notices.lengths
        whole = len(notices.keys) // 8 * 8
        keys: Vector = np.frombuffer(notices.keys[:whole], dtype=np.int64)
        if (
            not 0 <= notices.frontend < len(self._applied)
            or not len(notices.slots) == len(notices.generations) == len(lengths)
            or sum(lengths) * 8 != len(notices.keys)
            or any(length < 1 for length in lengths)
            or any(not 0 <= slot < len(self._generations) for slot in notices.slots)
            or not keys.all()
        ):
            raise WireError("routing notices whose lengths, slots and keys do not agree")
        counted = 0
        start = 0
        for slot, generation, length in zip(notices.slots, notices.generations, lengths, strict=True):
            if generation > 0 and self._generations[slot] == generation:
                self._table.add(keys[start : start + length], slot, self._table.tick + 1)
                counted += 1
            start += length
        self._applied[notices.frontend] = notices.last
        return counted

    def age(self, now: float, older_than_s: float) -> int:
        """`aging`, at once; returns how many blocks were dropped."""
        return sum(self.aging(now, older_than_s))

    def aging(self, now: float, older_than_s: float) -> Iterator[int]:
        """Drop what has not been used for `older_than_s` seconds, in steps of a few milliseconds; called now and then.
        Yields how many blocks each step dropped.

        Ages are known as finely as this is called, and from this object's beginning on.
        """
        tick = None
        while self._marks and self._marks[0][0] <= now - older_than_s:
            tick = self._marks.popleft()[1]
        self._marks.append((now, self._table.tick + 1))
        if tick is not None:
            yield from self._table.expiring(tick)

    def __len__(self) -> int:
        """Blocks in the index. A full pass."""
        return len(self._table)
