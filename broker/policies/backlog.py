"""How much of the prompts queued at each instance is still to be computed, judged by time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from broker.policies.base import Vector

Tokens = NDArray[np.float64]

LEARNING = 1 / 64
"""Weight of the newest observation in the speed."""
DOUBT = 0.5
"""The part of a queue that counts however late it is: what is overdue may be at a slow engine, or wait for a slot."""


class Backlog:
    """Queued tokens, less what should have been computed since the queue last moved.

    Counters show a prompt whole until its answer begins: one that has just begun looks like one that is nearly done.
    Of instances with equal counters, the one whose queue began to stand first is free first.

    How fast queues move is learned from how they shrink, waiting for a free slot included. It is seen only at this
    frontend's own decisions, so queues are rather taken for slower than they are, and for longer.
    """

    def __init__(self, slots: int) -> None:
        """For slots below that number."""
        self._seen: Vector = np.zeros(slots, dtype=np.int64)
        """The counters, as last seen."""
        self._since = np.zeros(slots)
        """When the queue last shrank, or began."""
        self._speed = 0.0
        """Tokens/s of one instance."""

    def left(self, slots: Vector, queued: Vector, now: float) -> Tokens:
        """Tokens to be computed in front of a prompt that comes to each of `slots` now. `now` is in seconds."""
        change = queued - self._seen.take(slots)
        for moved in change.nonzero()[0].tolist():  # few: what has happened since the last decision
            self._observe(slots.item(moved), change.item(moved), now)
        computed: Tokens = now - self._since.take(slots)
        computed *= self._speed
        left: Tokens = queued - np.minimum(computed, queued * (1.0 - DOUBT))
        return left

    def add(self, slot: int, tokens: int, now: float) -> None:
        """A prompt of so many tokens was sent there."""
        if tokens > 0:
            self._observe(slot, tokens, now)

    def _observe(self, slot: int, change: int, now: float) -> None:
        seen = self._seen.item(slot)
        self._seen[slot] = seen + change
        if change < 0:
            stood = now - self._since.item(slot)
            if stood > 0.0:
                self._speed += LEARNING * (-change / stood - self._speed)
        if change < 0 or not seen:
            self._since[slot] = now
