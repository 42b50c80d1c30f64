"""`cache_aware`: FastDeploy's weighing of prefix hits against load."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import numpy as np

from broker.policies.base import Loads, Options, Vector, Why, least
from broker.prefix import PrefixIndex
from broker.types import RouteRequest


class CacheAware:
    """Smallest `(100 - hit) / 100 x hit-ratio-weight + load / max load x load-balance-weight`; load is live requests.

    The original's rule: when the loads differ by more than both balance thresholds, or the prompt has no text, the
    fewest prompt tokens decide, and nothing is recorded. `hit` is the percentage of the prompt's full blocks that the
    instance has seen, an integer; equal sums are decided by prompt tokens.

    Mended: equals beyond that are drawn instead of the first winning; an instance that has seen less of the prompt than
    another gets its own percentage instead of 0; who was sent a prefix keeps its hits when others diverge in the
    middle of it; the memory is shared by all frontends and survives restarts.
    """

    counts_prompts = False

    def __init__(self, options: Options, rng: Random, index: PrefixIndex) -> None:
        self._options = options
        self._missed = (100 - np.arange(101)) / 100 * options.hit_ratio_weight
        """The sum's first part, by percentage of hits."""
        self._rng = rng
        self._index = index
        self._by_load: RouteRequest | None = None
        """The request picked for last, if its prompt had no part in it."""
        self.why: Why | None = None

    def pick(self, request: RouteRequest, view: Loads) -> int:
        return self.decide(request, view, view.in_flight)

    def decide(self, request: RouteRequest, view: Loads, loads: Vector) -> int:
        """The sums over `loads`, which differ between this policy and its remote variant."""
        options = self._options
        most: int = loads.item(loads.argmax())
        apart: int = most - loads.item(loads.argmin())
        uneven = apart > options.balance_abs_threshold and apart > options.balance_rel_threshold * most
        if uneven or not (request.prompt or request.prompt_ids):
            self._by_load = request
            reason = "load imbalanced" if uneven else "tokenize failed: empty prompt for tokenizer"
            self.why = Why(view.tokens, loads=loads, reason=reason)
            return int(view.slots[least(view.tokens, self._rng)])
        self._by_load = None
        match = self._index.match(request)
        depths = match.depths.take(view.slots)
        hits = depths * 100
        hits //= max(len(match.keys), 1)
        scores = self._missed.take(hits)
        if most:
            scores += loads / most * options.load_balance_weight
        self.why = Why(scores, depths, match.blocks, loads, hits)
        first = scores.argmin()
        best = (scores == scores[first]).nonzero()[0]
        if len(best) > 1:  # only then their tokens are added up
            first = best[least(view.tokens.take(best), self._rng)]
        return view.slots.item(first)

    def tokens(self, request: RouteRequest, slot: int) -> int:
        return request.prompt_tokens

    def placed(self, request: RouteRequest, slot: int) -> None:
        if request is not self._by_load:
            self._index.note(self._index.matched(request), slot, counted=False)

    def cached(self, request: RouteRequest) -> Mapping[int, int]:
        return self._index.matched(request).cached(request.prompt_tokens)
