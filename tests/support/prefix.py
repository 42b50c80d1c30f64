"""A prefix index for tests of policies: the real one, with one frontend."""

from __future__ import annotations

from pathlib import Path

from broker.prefix import PREFIX, PrefixIndex, PrefixWriter, prefix_layout
from broker.route import RouteRequest
from shm.segment import Segment

SLOTS = 128
BLOCK = 4


class Prefixes:
    """The index, and both ways of filling it."""

    def __init__(self, directory: Path) -> None:
        segment = Segment.create(directory / PREFIX, prefix_layout(SLOTS, 1, capacity=4096))
        self.writer = PrefixWriter(segment, dict.fromkeys(range(SLOTS), 1))
        self.index = PrefixIndex(segment, 0, block=BLOCK)

    def sent(self, prompt: str, *slots: int) -> None:
        """The prompt has been sent to these, and everybody knows."""
        for slot in slots:
            self.index.note(RouteRequest(prompt=prompt), slot)
        self.deliver()

    def deliver(self) -> None:
        while notices := self.index.batch():
            self.writer.apply(notices)

    def who_has(self, prompt: str) -> dict[int, int]:
        """Slot to leading blocks."""
        depths = self.index.match(RouteRequest(prompt=prompt)).depths
        return {slot: depth for slot, depth in enumerate(depths.tolist()) if depth}
