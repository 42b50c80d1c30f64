"""`power_of_two`: the less loaded of two drawn candidates."""

from __future__ import annotations

from random import Random

from broker.policies.base import Loads
from broker.route import RouteRequest


class PowerOfTwo:
    """Two distinct candidates are drawn; the one with fewer live requests wins.

    The original's rule, on live counters of all frontends. On a tie the first drawn wins, which is fair: each order
    of a pair is equally likely.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def pick(self, request: RouteRequest, view: Loads) -> int:
        slots = view.listed
        n = len(slots)
        if n == 1:
            return slots[0]
        draw = self._rng.random
        one = int(draw() * n)
        other = int(draw() * (n - 1))
        other += other >= one  # distinct, and every ordered pair equally likely
        requests = view.requests
        return slots[other if requests[other] < requests[one] else one]
