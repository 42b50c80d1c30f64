"""The scheduler's half of the prefix index."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from broker.errors import WireError
from broker.prefix.keys import Vector
from broker.prefix.layout import PREFIX
from broker.wire import RoutingNotices
from shm.hashtable import TableWriter
from shm.segment import Layout, Segment

LEAVING = -1
"""Instead of a generation: the slot is being forgotten. Without it, a scheduler killed within a pass would leave the
rest of it to the slot's next instance."""


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
