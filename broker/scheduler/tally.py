"""What the scheduler counts of itself, and its rule for logging what a peer does wrong: once per peer."""

from __future__ import annotations

import logging
from collections.abc import MutableSequence
from enum import IntEnum

logger = logging.getLogger("scheduler")

MOST_PEERS = 4096
"""Peers whose misdeeds are remembered; beyond that new ones are only counted."""


class Event(IntEnum):
    """Counters that only rise."""

    REGISTRATIONS = 0  # answered 200, repeated ones included
    REGISTRATIONS_REFUSED = 1
    HEALTH_CHECKS_FAILED = 2
    POLLS_FAILED = 3  # `/metrics` did not answer, or not with load
    FRAMES_DROPPED = 4  # malformed, oversized or foreign
    LOADS_DROPPED = 5  # of instances that are not registered
    LOADS_MISSED = 6  # by the gaps in publishers' sequences
    REPLIES_DROPPED = 7  # the peer was gone, or took no more


class Tally:
    """Owned by the scheduler's loop. `cells` may lie in shared memory, where frontends show them."""

    def __init__(self, cells: MutableSequence[int] | memoryview | None = None) -> None:
        self._cells = [0] * len(Event) if cells is None else cells
        self._peers: set[object] = set()

    def __repr__(self) -> str:
        return f"Tally({', '.join(f'{event.name}={self[event]}' for event in Event if self[event])})"

    def __getitem__(self, event: Event) -> int:
        return int(self._cells[event])

    def add(self, event: Event, amount: int = 1) -> None:
        self._cells[event] += amount

    def dropped(self, where: str, peer: bytes | str, reason: object) -> None:
        """A frame that cannot be used: counted, logged once per peer."""
        self.add(Event.FRAMES_DROPPED)
        if self.first((where, peer)):
            shown = peer.hex() if isinstance(peer, bytes) else peer
            logger.warning("%s: dropped a message of peer %s: %s (said once per peer)", where, shown, reason)

    def first(self, what: object) -> bool:
        """True the first time, so that a line is logged once."""
        if what in self._peers or len(self._peers) >= MOST_PEERS:
            return False
        self._peers.add(what)
        return True
