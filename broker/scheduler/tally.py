"""What the scheduler counts of itself, and its rule for logging what a peer does wrong: once per peer."""

from __future__ import annotations

import logging
from collections.abc import MutableSequence

from broker.table import SchedulerEvent

logger = logging.getLogger("scheduler")

MOST_PEERS = 4096
"""Peers whose misdeeds are remembered; beyond that new ones are only counted."""


class Tally:
    """Owned by the scheduler's loop. `cells` by event, as a rule in shared memory, where frontends show them."""

    def __init__(self, cells: MutableSequence[int] | memoryview | None = None) -> None:
        self._cells = [0] * len(SchedulerEvent) if cells is None else cells
        self._peers: set[object] = set()

    def __repr__(self) -> str:
        return f"Tally({', '.join(f'{event.name}={self[event]}' for event in SchedulerEvent if self[event])})"

    def __getitem__(self, event: SchedulerEvent) -> int:
        return int(self._cells[event])

    def add(self, event: SchedulerEvent, amount: int = 1) -> None:
        self._cells[event] += amount

    def dropped(self, where: str, peer: bytes | str, reason: object) -> None:
        """A frame that cannot be used: counted, logged once per peer."""
        self.add(SchedulerEvent.FRAMES_DROPPED)
        if self.first((where, peer)):
            shown = peer.hex() if isinstance(peer, bytes) else peer
            logger.warning("%s: dropped a message of peer %s: %s (said once per peer)", where, shown, reason)

    def first(self, what: object) -> bool:
        """True the first time, so that a line is logged once."""
        if what in self._peers or len(self._peers) >= MOST_PEERS:
            return False
        self._peers.add(what)
        return True
