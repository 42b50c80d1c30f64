"""`prefix_cost`: the instance where a prompt costs least, its own waiting and that of others behind it included."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import numpy as np
from numpy.typing import NDArray

from broker.policies.base import Loads, Why, least
from broker.prefix import Match, PrefixIndex
from broker.types import RouteRequest

Costs = NDArray[np.float64]

QUEUED = 0.05
"""What a token queued at the instance costs, when one that must be computed anew costs 1: work done twice delays all
who come behind it, a queue only those in it."""
COPIES = 2.0
"""A beginning of prompts may have this many times its fair number of copies before a copy costs its full price."""
UNSURE = 64.0
"""Requests that are taken to have been without it when the share of a beginning is estimated."""
CROWDED = 1.8
"""What being twice as crowded as the mean costs, in mean requests."""
FEW = 8.0
"""Added to the mean number of requests there: with few in flight, a difference of some is chance."""
SPENT = 0.7
"""What having had twice the mean work of late costs, in mean requests."""
MEMORY = 4096
"""Decisions that "of late" reaches back."""
LEARNING = 1 / 256
"""Weight of the newest request in the mean."""


class PrefixCost:
    """Least cost, in tokens, of these four; no setting, and no unit that depends on the tokenizer or on the fleet:

    * the prompt's tokens that the instance has not seen, at their price: 1, less for beginnings that are hot;
    * 0.05 of the tokens queued there (prompts that have no first token yet);
    * how much more crowded than the mean it is: requests in flight, in units of the mean request's work;
    * the work it had of late, which keeps the fleet even when nothing else tells the instances apart.

    **The price of a copy.** A fixed weight between cache and load is wrong for somebody: a small weight on load lets
    everybody who begins alike queue at one instance, a large one copies what nobody else will ask for. What decides is
    how many will use the copy. Of the recent requests a share `s` begins with a block; so `s` of the fleet, `s x n`
    instances, can be kept busy by it. While there are fewer than twice as many copies, another one is an investment
    and costs a part, `(copies / 2 s n)^2`, of the work it takes; from there on, all of it. Heads that everybody has
    spread at the first sign of a queue; a document that three requests share stays where it is.

    **Crowding** counts by the power 1.5 of the relative difference, so that it decides where outputs differ widely and
    slots are short, and is silent where all instances have about the same number of requests.

    Ties are drawn. `tokens` is what the instance has to compute for the request: the lease must be taken for that many,
    so that the view's tokens are the work that is queued, and not prompts that are mostly cached.
    """

    counts_prompts = True

    def __init__(self, rng: Random, index: PrefixIndex) -> None:
        self._rng = rng
        self._index = index
        self._mean = 0.0
        """Uncached tokens of a request."""
        self._spent: Costs = np.zeros(0)
        """Uncached tokens sent to each slot by this frontend, fading."""
        self.why: Why | None = None

    def pick(self, request: RouteRequest, view: Loads) -> int:
        slots = view.slots
        match = self._index.match(request)
        depths = match.depths.take(slots)
        per_block = request.prompt_tokens / max(match.blocks, 1.0)
        if not len(self._spent):
            self._spent = np.zeros(len(match.depths))
            self._mean = float(request.prompt_tokens)

        cost = _missing(match, depths) * per_block
        cost += QUEUED * view.tokens
        cost += SPENT * len(slots) / MEMORY * self._spent.take(slots)
        in_flight = view.in_flight
        mean = in_flight.sum() / len(slots)
        crowd = (in_flight - mean) / (mean + FEW)
        cost += CROWDED * self._mean * crowd * np.sqrt(np.abs(crowd))

        self.why = Why(cost, depths, match.blocks)
        return int(slots[least(cost, self._rng)])

    def tokens(self, request: RouteRequest, slot: int) -> int:
        """Prompt tokens that the instance has to compute."""
        return round(_uncached(request, self._index.matched(request), slot))

    def placed(self, request: RouteRequest, slot: int) -> None:
        match = self._index.matched(request)
        uncached = _uncached(request, match, slot)
        self._index.note(match, slot)
        if not len(self._spent):
            self._spent = np.zeros(len(match.depths))
            self._mean = float(request.prompt_tokens)
        self._mean += LEARNING * (uncached - self._mean)
        self._spent *= 1.0 - 1.0 / MEMORY
        self._spent[slot] += uncached

    def cached(self, request: RouteRequest) -> Mapping[int, int]:
        return self._index.matched(request).cached(request.prompt_tokens)


def _uncached(request: RouteRequest, match: Match, slot: int) -> float:
    per_block = request.prompt_tokens / max(match.blocks, 1.0)
    return max(request.prompt_tokens - per_block * match.depths.item(slot), 0.0)


def _missing(match: Match, depths: NDArray[np.int64]) -> Costs:
    """Blocks that each candidate has not seen and another has, at their prices. What nobody has costs all the same."""
    deepest = int(depths.max())
    if not deepest:
        return np.zeros(len(depths))
    # How many copies each of the leading blocks deserves; hotter blocks come first.
    shares = (match.uses(deepest) - 1.0) / (match.requests + UNSURE)
    wanted = COPIES * len(depths) * shares
    hot = int(np.count_nonzero(wanted > 1.0))
    if not hot:  # one copy is enough of everything: the usual case
        return (deepest - depths).astype(np.float64)
    copies = len(depths) - np.cumsum(np.bincount(depths, minlength=hot)[:hot])
    price = np.minimum(copies / wanted[:hot], 1.0)
    saved = np.zeros(deepest + 1)  # by depth: what the blocks up to it would have cost
    saved[1 : hot + 1] = price * price
    saved[hot + 1 :] = 1.0
    np.cumsum(saved, out=saved)
    missing: Costs = saved[deepest] - saved.take(depths)
    return missing
