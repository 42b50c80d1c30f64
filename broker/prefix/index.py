"""A frontend's half of the prefix index: looks prompts up, and notes where they were sent."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from broker.config import Config
from broker.prefix.keys import BLOCKS, Vector, namespace, text_keys, token_keys
from broker.prefix.layout import PREFIX, run_layout
from broker.prefix.match import Match
from broker.types import RouteRequest
from broker.wire import RoutingNotices
from shm.hashtable import TableReader
from shm.segment import Layout, Segment

BATCH_BYTES = 48 * 1024
"""Keys in one message to the scheduler."""
BATCH_NOTICES = 64
"""Notices in one message: each costs the scheduler some 30 us, however short it is."""
OUTBOX_BYTES = 1024 * 1024
"""Keys that may wait to be sent; beyond, the oldest notices are lost."""
PENDING = 128
"""Own notices that the overlay keeps while they are not applied."""
TOLD_EVERY = 16
"""Blocks from one that is remembered as told to the next."""
TOLD = 1 << 16
"""Such blocks remembered, some 8 MiB."""
REPEAT_S = 60.0
"""What an instance has been sent is told again after this time, unless the settings say otherwise."""
REPEAT_PART = 8
"""That is, when this part of the time is over after which the table forgets, or when this part of the table has been
given to others: what is in use must not look old."""


class _Notice(NamedTuple):
    number: int
    first: int
    """The first key."""
    keys: Vector
    slot: int
    generation: int
    told: int
    """So many of the first keys need not be said."""


class PrefixIndex:
    """A frontend's half: looks up prompts, and notes where they were sent. Reads shared memory, never writes it."""

    def __init__(
        self,
        segment: Segment,
        frontend: int,
        *,
        block: int = 64,
        limit: int = BLOCKS,
        repeat_s: float = REPEAT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = TableReader(segment)
        self._generations = segment.cells("generations")
        self._applied = segment.cells("applied")
        self._frontend = frontend
        self.block = block
        """Characters, or token ids, of a block."""
        self.slots = len(self._generations)
        """Instances are in slots below that number."""
        self._limit = limit
        self._number = self._applied[frontend]
        self._pending: deque[_Notice] = deque(maxlen=PENDING)
        self._outbox: deque[_Notice] = deque()
        self._outbox_keys = 0
        self._told = _Told(self._table, repeat_s, clock)
        self._last: tuple[RouteRequest | None, Vector, float] = (None, np.empty(0, dtype=np.int64), 0.0)
        self._matched: Match | None = None
        """Of the last request."""
        self.lost = 0
        """Notices given up because the scheduler did not take them in time."""
        self.on_note: Callable[[], None] = lambda: None
        """Hears that there is something to tell."""

    @classmethod
    def attach(
        cls,
        run_dir: Path,
        layout: Layout,
        frontend: int,
        *,
        block: int = 64,
        limit: int = BLOCKS,
        repeat_s: float = REPEAT_S,
    ) -> PrefixIndex:
        """Map the run's index, read-only. Raises SegmentError."""
        return cls(Segment.attach(run_dir / PREFIX, layout), frontend, block=block, limit=limit, repeat_s=repeat_s)

    @classmethod
    def of_run(cls, run_dir: Path, config: Config, frontend: int) -> PrefixIndex:
        """As these settings ask for. Raises SegmentError."""
        scheduler = config.scheduler
        return cls.attach(
            run_dir,
            run_layout(config),
            frontend,
            block=scheduler.cache_block_size,
            limit=scheduler.prefix_blocks_per_prompt,
            repeat_s=scheduler.eviction_duration_mins * 60 / REPEAT_PART,
        )

    def match(self, request: RouteRequest) -> Match:
        """What is known of the request's prompt. The keys of the last request are kept: it may be picked for again."""
        if not self._is_last(request):
            self._last = (request, *self._keys(request))
        _, keys, blocks = self._last
        found = self._table.find(keys)
        depths = found.reach[: self.slots]
        pending = self._overlay(keys, depths)
        self._matched = Match(keys, blocks, depths, found, pending, len(self._pending))
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

    def _overlay(self, keys: Vector, depths: Vector) -> list[int]:
        """Adds the own notices that the scheduler has not applied yet; the depths of those that begin alike."""
        pending = self._pending
        applied = self._applied[self._frontend]
        while pending and pending[0].number <= applied:
            pending.popleft()
        if not pending or not len(keys):
            return []
        alike = []
        first = keys.item(0)
        for notice in pending:
            if notice.first != first or self._generations[notice.slot] != notice.generation:
                continue
            shared = min(len(keys), len(notice.keys))
            apart = (keys[:shared] != notice.keys[:shared]).nonzero()[0]
            depth = int(apart[0]) if len(apart) else shared
            alike.append(depth)
            if depth > depths[notice.slot]:
                depths[notice.slot] = depth
        return alike

    def note(self, match: Match, slot: int, *, counted: bool = True) -> None:
        """The prompt goes to `slot`: seen by this frontend at once, by the others when a batch has been applied.

        `counted`: it is one more use of every block, for those who ask how often they are used (`Match.uses`).
        Otherwise what matters is that the instance has it, and what was told of late is not said again: of a prompt
        that goes on where another one ended, only the rest.
        """
        if not len(match.keys):
            return
        told = 0 if counted else self._told.tell(match, slot)
        if told == len(match.keys):
            return
        self._number += 1
        notice = _Notice(self._number, match.keys.item(0), match.keys, slot, self._generations[slot], told)
        self._pending.append(notice)
        self._outbox.append(notice)
        self._outbox_keys += len(notice.keys) - told
        while self._outbox_keys * 8 > OUTBOX_BYTES:
            lost = self._outbox.popleft()
            self._outbox_keys -= len(lost.keys) - lost.told
            self.lost += 1
        self.on_note()

    def batch(self) -> RoutingNotices | None:
        """The next message to the scheduler; None when there is nothing to tell.

        Called every few milliseconds while there is something, and sent without waiting; it need not arrive.
        """
        batch: list[_Notice] = []
        parts: list[Vector] = []
        size = 0
        while self._outbox and len(batch) < BATCH_NOTICES:
            notice = self._outbox[0]
            keys = notice.keys[notice.told :]
            if (size := size + keys.nbytes) > BATCH_BYTES:
                break
            batch.append(self._outbox.popleft())
            parts.append(keys)
            self._outbox_keys -= len(keys)
        if not batch:
            return None
        return RoutingNotices(
            self._frontend,
            batch[-1].number,
            [notice.slot for notice in batch],
            [notice.generation for notice in batch],
            [len(keys) for keys in parts],
            np.concatenate(parts).tobytes(),
        )


class _Told:
    """What of prompts has been told of which instance, of late: every so many blocks, and the last one, by key.

    Telling all of it again would only say that it is in use still, at the price of hashing and looking it up twice
    over. It need not be right: what the table does not have is told, whatever stands here.
    """

    def __init__(self, table: TableReader, repeat_s: float, clock: Callable[[], float]) -> None:
        self._table = table
        self._repeat_s = repeat_s
        self._clock = clock
        self._keys: defaultdict[int, set[int]] = defaultdict(set)
        self._room = TOLD
        self._until_s = 0.0
        self._until_inserted = 0

    def tell(self, match: Match, slot: int) -> int:
        """How many leading blocks of the prompt need not be told of the instance; the rest counts as told now."""
        now = self._clock()
        if self._room < 0 or now >= self._until_s or self._table.inserted >= self._until_inserted:
            self._keys.clear()
            self._room = TOLD
            self._until_s = now + self._repeat_s
            self._until_inserted = self._table.inserted + self._table.capacity // REPEAT_PART
        keys, known = match.keys, self._keys[slot]
        had: int = match.depths.item(slot)
        if had == len(keys) and keys.item(-1) in known:
            return had
        marks: list[int] = keys[TOLD_EVERY - 1 :: TOLD_EVERY].tolist()
        told = had // TOLD_EVERY
        while told and marks[told - 1] not in known:
            told -= 1
        known.update(marks[told:])
        known.add(keys.item(-1))
        self._room -= len(marks) - told + 1
        return told * TOLD_EVERY
