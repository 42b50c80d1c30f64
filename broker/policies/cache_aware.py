"""`cache_aware`: FastDeploy's weighing of prefix hits against load."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import numpy as np

from broker.policies.base import FEW, Loads, Options, Vector, Why, least
from broker.policies.policy import Policy
from broker.prefix import PrefixIndex
from broker.route import RouteRequest


class CacheAware(Policy):
    """Smallest `(100 - hit) / 100 x hit-ratio-weight + load / max load x load-balance-weight`; load is live requests.

    The original's rule: when the loads differ by more than both balance thresholds, or the prompt has no text, the
    fewest prompt tokens decide, and nothing is recorded. `hit` is the percentage of the prompt's full blocks that the
    instance has seen, an integer; equal sums are decided by prompt tokens.

    Mended: equals beyond that are drawn instead of the first winning; an instance that has seen less of the prompt than
    another gets its own percentage instead of 0; who was sent a prefix keeps its hits when others diverge in the
    middle of it; the memory is shared by all frontends and survives restarts.
    """

    def __init__(self, options: Options, rng: Random, index: PrefixIndex) -> None:
        super().__init__(counts_prompts=False)
        self._abs_threshold = options.balance_abs_threshold
        self._rel_threshold = options.balance_rel_threshold
        self._load_weight = options.load_balance_weight
        self._missed = [(100 - hit) / 100 * options.hit_ratio_weight for hit in range(101)]
        """The sum's first part, by percentage of hits."""
        self._missed_vector = np.array(self._missed)
        self._rng = rng
        self._index = index
        self._by_load: RouteRequest | None = None
        """The request picked for last, if its prompt had no part in it."""

    def pick(self, request: RouteRequest, view: Loads) -> int:
        return self.decide(request, view, view.requests)

    def decide(self, request: RouteRequest, view: Loads, loads: tuple[int, ...] | Vector) -> int:
        """The sums over `loads`, which differ between this policy and its remote variant."""
        if isinstance(loads, tuple):
            return self._of_few(request, view, loads)
        if len(loads) <= FEW:
            return self._of_few(request, view, tuple(loads.tolist()))
        return self._of_many(request, view, loads)

    def _of_few(self, request: RouteRequest, view: Loads, loads: tuple[int, ...]) -> int:
        """`_of_many` number by number: a dozen numpy calls take longer than the sums of a few candidates."""
        most = fewest = loads[0]
        for load in loads:
            if load > most:
                most = load
            elif load < fewest:
                fewest = load
        if self._goes_by_load(request, view, loads, most, most - fewest):
            return view.listed[least(tuple(view.tokens.tolist()), self._rng)]
        prompt = self._index.prompt(request)
        depths = self._index.depths(prompt, view.listed)
        blocks = max(len(prompt.keys), 1)
        hits = []
        scores = []
        smallest = 0.0
        for at, load in enumerate(loads):
            hit = depths[at] * 100 // blocks
            score = self._missed[hit]
            if most:
                score += load / most * self._load_weight
            if at == 0 or score < smallest:
                smallest = score
            hits.append(hit)
            scores.append(score)
        self.why = Why(scores, depths, prompt.blocks, loads, hits)
        first = scores.index(smallest)
        if scores.count(smallest) > 1:  # only then their tokens are added up
            tokens: list[int] = view.tokens.tolist()
            best = [at for at, score in enumerate(scores) if score == smallest]
            first = best[least(tuple([tokens[at] for at in best]), self._rng)]
        return view.listed[first]

    def _of_many(self, request: RouteRequest, view: Loads, loads: Vector) -> int:
        most: int = loads.item(loads.argmax())
        if self._goes_by_load(request, view, loads, most, most - loads.item(loads.argmin())):
            return int(view.slots[least(view.tokens, self._rng)])
        match = self._index.match(request)
        depths = match.depths.take(view.slots)
        hits = depths * 100
        hits //= max(len(match.keys), 1)
        scores = self._missed_vector.take(hits)
        if most:
            scores += loads / most * self._load_weight
        self.why = Why(scores, depths, match.blocks, loads, hits)
        first = scores.argmin()
        best = (scores == scores[first]).nonzero()[0]
        if len(best) > 1:
            first = best[least(view.tokens.take(best), self._rng)]
        return int(view.slots[first])

    def _goes_by_load(
        self, request: RouteRequest, view: Loads, loads: tuple[int, ...] | Vector, most: int, apart: int
    ) -> bool:
        """Whether the prompt has no part in the choice: the fewest tokens decide."""
        uneven = apart > self._abs_threshold and apart > self._rel_threshold * most
        if not uneven and (request.prompt or request.prompt_ids):
            self._by_load = None
            return False
        self._by_load = request
        reason = "load imbalanced" if uneven else "tokenize failed: empty prompt for tokenizer"
        self.why = Why(view.tokens, loads=loads, reason=reason)
        return True

    def tokens(self, request: RouteRequest, slot: int) -> int:
        return request.prompt_tokens

    def placed(self, request: RouteRequest, slot: int) -> None:
        if request is not self._by_load:
            self._index.tell(request, slot)

    def cached(self, request: RouteRequest) -> Mapping[int, int]:
        return self._index.matched(request).cached(request.prompt_tokens)
