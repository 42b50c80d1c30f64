"""`round_robin`: one candidate after another."""

from __future__ import annotations

from broker.policies.base import Loads
from broker.route import RouteRequest

SETS = 1024
"""Candidate sets whose turn is remembered."""


class RoundRobin:
    """Candidates in the order of their URLs, one step per choice, starting at `offset` (0 <= offset < 1) of the circle.

    The original's rule, mended twice. Frontends start at different offsets, so that they never step in unison. And
    each set of candidates has a turn of its own. Without this: (1) two models have two instances each, (2) their
    requests alternate, (3) the common counter is even for one and odd for the other, and half of the instances
    never get a request. Sets are told apart by size, first and last slot; sets alike in these share a turn.
    """

    def __init__(self, offset: float) -> None:
        self._offset = offset
        self._turns: dict[tuple[int, int, int], int] = {}

    def pick(self, request: RouteRequest, view: Loads) -> int:
        slots = view.listed
        n = len(slots)
        key = (n, slots[0], slots[-1])
        turns = self._turns
        turn = turns.get(key)
        if turn is None:
            if len(turns) == SETS:
                del turns[next(iter(turns))]  # the oldest: fleets change, and a dict must not grow with them
            turn = int(self._offset * n)
        turns[key] = (turn + 1) % n
        return slots[turn]
