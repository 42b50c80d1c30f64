"""`remote_cache_aware`: `cache_aware` over what the engines report."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from broker.policies.base import Loads, Options
from broker.policies.cache_aware import CacheAware
from broker.policies.policy import Policy
from broker.prefix import PrefixIndex
from broker.route import RouteRequest


class RemoteCacheAware(Policy):
    """The sums of `cache_aware`, loads being the requests that engines report, those of other routers included.

    The original fetches them from every engine before each decision. Here they come from the shared table, at most a
    second old (`manager.metrics-interval-secs`), corrected by what this host's counters have moved since the report.
    """

    def __init__(self, options: Options, rng: Random, index: PrefixIndex) -> None:
        super().__init__(counts_prompts=False)
        self._rule = CacheAware(options, rng, index)

    def pick(self, request: RouteRequest, view: Loads) -> int:
        slot = self._rule.decide(request, view, view.load)
        self.why = self._rule.why
        return slot

    def tokens(self, request: RouteRequest, slot: int) -> int:
        return self._rule.tokens(request, slot)

    def placed(self, request: RouteRequest, slot: int) -> None:
        self._rule.placed(request, slot)

    def cached(self, request: RouteRequest) -> Mapping[int, int]:
        return self._rule.cached(request)
