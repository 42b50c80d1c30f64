"""`remote_cache_aware`: `cache_aware` over what the engines report."""

from __future__ import annotations

from random import Random

from broker.policies.base import Loads, Options, Why
from broker.policies.cache_aware import CacheAware
from broker.prefix import PrefixIndex
from broker.route import RouteRequest


class RemoteCacheAware:
    """The sums of `cache_aware`, loads being the requests that engines report, those of other routers included.

    The original fetches them from every engine before each decision. Here they come from the shared table, at most a
    second old (`manager.metrics-interval-secs`), corrected by what this host's counters have moved since the report.
    """

    counts_prompts = False

    def __init__(self, options: Options, rng: Random, index: PrefixIndex) -> None:
        self._rule = CacheAware(options, rng, index)
        self.tokens = self._rule.tokens
        self.placed = self._rule.placed
        self.cached = self._rule.cached

    @property
    def why(self) -> Why | None:
        return self._rule.why

    def pick(self, request: RouteRequest, view: Loads) -> int:
        return self._rule.decide(request, view, view.load)
