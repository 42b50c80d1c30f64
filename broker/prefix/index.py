"""A frontend's half of the prefix index: looks prompts up, and notes where they were sent."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from broker.config import Config
from broker.prefix.keys import BLOCKS, Vector, alike, namespace, text_keys, token_keys
from broker.prefix.layout import PREFIX, run_layout
from broker.prefix.match import Match
from broker.route import RouteRequest
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


class _Notice:
    __slots__ = ("first", "generation", "keys", "number", "slot", "told")

    def __init__(self, number: int, keys: Vector, slot: int, generation: int, told: int) -> None:
        """`told`: so many of the first keys need not be said."""
        self.number = number
        self.first: int = keys.item(0)
        self.keys = keys
        self.slot = slot
        self.generation = generation
        self.told = told


class Prompt:
    """A prompt in blocks, and what was found of it at its last look-up: it is asked for again, for the size of a lease,
    a notice, a ticket."""

    __slots__ = ("blocks", "depths", "keys", "match", "request", "slots")

    def __init__(self, request: RouteRequest, keys: Vector, blocks: float) -> None:
        self.request = request
        self.keys = keys
        """One per full block, at most the cap."""
        self.blocks = blocks
        """Its whole length; the last one need not be full, and the cap does not count."""
        self.match: Match | None = None
        self.slots: tuple[int, ...] = ()
        """Those that `PrefixIndex.depths` was asked for, if it was the last to be asked,"""
        self.depths: list[int] = []
        """and what it said."""


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
        self._last: Prompt | None = None
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

    def prompt(self, request: RouteRequest) -> Prompt:
        """The request's prompt. The last one is kept: it may be picked for again, and the legs of a pair have one."""
        last = self._last
        if last is not None and (
            request is (before := last.request)
            or (
                request.prompt is before.prompt
                and request.prompt_ids is before.prompt_ids
                and request.model == before.model
            )
        ):
            return last
        model = request.model or ""
        if request.prompt_ids:
            length = len(request.prompt_ids)
            keys = token_keys(request.prompt_ids, self.block, namespace(model, self.block, "token"), self._limit)
        else:
            length = len(request.prompt)
            keys = text_keys(request.prompt, self.block, namespace(model, self.block, "text"), self._limit)
        self._last = last = Prompt(request, keys, length / self.block)
        return last

    def match(self, request: RouteRequest) -> Match:
        """What is known of the request's prompt."""
        prompt = self.prompt(request)
        keys = prompt.keys
        found = self._table.find(keys)
        depths = found.reach[: self.slots]
        pending = []
        for slot, depth in self._overlay(keys):
            pending.append(depth)
            if depth > depths[slot]:
                depths[slot] = depth
        prompt.slots, prompt.depths = (), []
        prompt.match = match = Match(keys, prompt.blocks, depths, found, pending, len(self._pending))
        return match

    def matched(self, request: RouteRequest) -> Match:
        """What `match` said of the request, if it is the last one; else what it says now."""
        return self.prompt(request).match or self.match(request)

    def depths(self, prompt: Prompt, slots: tuple[int, ...]) -> list[int]:
        """How many leading blocks of the prompt the instance in each of these slots has been sent: `match` for these
        few, none twice, alone."""
        depths = self._table.reach(prompt.keys, slots)
        for slot, depth in self._overlay(prompt.keys):
            if slot in slots and depth > depths[at := slots.index(slot)]:
                depths[at] = depth
        prompt.slots, prompt.depths = slots, depths
        return depths

    def _overlay(self, keys: Vector) -> list[tuple[int, int]]:
        """Own notices that the scheduler has not applied yet and that begin like these keys: slot, blocks in common."""
        pending = self._pending
        applied = self._applied[self._frontend]
        while pending and pending[0].number <= applied:
            pending.popleft()
        if not pending or not len(keys):
            return []
        first = keys.item(0)
        return [
            (notice.slot, alike(keys, notice.keys))
            for notice in pending
            if notice.first == first and self._generations[notice.slot] == notice.generation
        ]

    def note(self, request: RouteRequest, slot: int) -> None:
        """The request's prompt goes to `slot`: seen by this frontend at once, by the others when a batch has been
        applied. It is one more use of every block, for those who ask how often they are used (`Match.uses`)."""
        keys = self.prompt(request).keys
        if len(keys):
            self._note(keys, slot, 0)

    def tell(self, request: RouteRequest, slot: int) -> None:
        """As `note`, where uses are not counted. What matters is that the instance has it, and what was told of late is
        not said again: of a prompt that goes on where another one ended, only the rest."""
        prompt = self.prompt(request)
        keys = prompt.keys
        if not len(keys):
            return
        if slot in prompt.slots:
            had = prompt.depths[prompt.slots.index(slot)]
        elif prompt.match is not None:
            had = prompt.match.depths.item(slot)
        else:
            had = self.depths(prompt, (slot,))[0]
        told = self._told.tell(keys, slot, had)
        if told < len(keys):
            self._note(keys, slot, told)

    def _note(self, keys: Vector, slot: int, told: int) -> None:
        self._number += 1
        notice = _Notice(self._number, keys, slot, self._generations[slot], told)
        self._pending.append(notice)
        self._outbox.append(notice)
        self._outbox_keys += len(keys) - told
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

    def tell(self, keys: Vector, slot: int, had: int) -> int:
        """How many leading blocks of a prompt need not be told of the instance, which has been sent `had` of them; the
        rest counts as told now."""
        now = self._clock()
        if self._room < 0 or now >= self._until_s or self._table.inserted >= self._until_inserted:
            self._keys.clear()
            self._room = TOLD
            self._until_s = now + self._repeat_s
            self._until_inserted = self._table.inserted + self._table.capacity // REPEAT_PART
        known = self._keys[slot]
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
