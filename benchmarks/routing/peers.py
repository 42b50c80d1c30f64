"""Rules of other routers, written anew from their described behaviour, to be measured against.

None of these is their code; what they cost in CPU is measured elsewhere.
"""

from __future__ import annotations

from random import Random

from broker.policies.base import Loads, least
from broker.route import RouteRequest

CHARS = 16
"""Grain of the tree here."""


class SglangCacheAware:
    """sglang-router's cache_aware with its defaults.

    Fewest requests when they differ by more than 64 and by more than a factor of 1.5; else the instance that has seen
    the longest beginning of the prompt if that is more than 0.3 of it; else fewest requests. It remembers every choice.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._seen: dict[tuple[int, str], int] = {}
        self._tenants: dict[int, dict[int, None]] = {}

    def pick(self, request: RouteRequest, view: Loads) -> int:
        text = request.prompt
        path, above = [], 0
        for start in range(0, len(text), CHARS):
            above = self._seen.setdefault((above, text[start : start + CHARS]), len(self._seen) + 1)
            path.append(above)
        loads = view.in_flight
        most, fewest = int(loads.max()), int(loads.min())
        slot = int(view.slots[least(loads, self._rng)])
        if not (most - fewest > 64 and most > 1.5 * fewest):
            depth = next((i for i, node in enumerate(path) if node not in self._tenants), len(path))
            if depth > 0.3 * len(path):
                slot = next(reversed(self._tenants[path[depth - 1]]))
        for node in path:
            tenants = self._tenants.setdefault(node, {})
            tenants.pop(slot, None)
            tenants[slot] = None
        return slot
