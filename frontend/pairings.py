"""Which pairs answered how often: more labels than shared memory has cells for, so each frontend counts its own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from broker.lease import Lease

MOST = 65_536
"""Different pairs and statuses; those beyond are counted by their decode instance alone."""


class Pairings:
    """Answers by decode instance (slot and generation) and status, and by the prefill that belonged to it."""

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[int, int, int], Counter[str]] = defaultdict(Counter)
        self._size = 0

    def count(self, prefill_url: str, decode: Lease, status: int) -> None:
        prefills = self._counts[decode.slot, decode.generation, status]
        if prefill_url not in prefills:
            if self._size >= MOST:
                return
            self._size += 1
        prefills[prefill_url] += 1

    def of(self, slot: int, generation: int, status: int) -> Mapping[str, int]:
        """Answers by prefill URL."""
        return self._counts.get((slot, generation, status), {})
