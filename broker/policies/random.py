"""`random`: any candidate."""

from __future__ import annotations

from random import Random

from broker.policies.base import Loads
from broker.route import RouteRequest


class RandomChoice:
    """Every candidate is equally likely; load does not count. The original's rule."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def pick(self, request: RouteRequest, view: Loads) -> int:
        slots = view.slots
        return int(slots[int(self._rng.random() * len(slots))])
