"""`prefix_cost`: the instance where a prompt costs least time, its own and that of those who come behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from random import Random

import numpy as np
from numpy.typing import NDArray

from broker.policies.backlog import Backlog
from broker.policies.base import Loads, Why, least
from broker.policies.policy import Policy
from broker.prefix import Match, PrefixIndex
from broker.route import RouteRequest

Costs = NDArray[np.float64]

BEHIND = 4.0
"""Requests that a token computed twice delays, besides its own."""
WASTED = 16.0
"""What it costs further if nobody asks for the copy again, in such requests."""
COPIES = 2.0
"""With this many times its fair number of copies another one is pure loss."""
UNSURE = 8.0
"""Requests that are taken to have been without it when the share of a beginning is estimated."""
SAMPLES = 32
"""Places of a prompt at which a copy's price is looked up."""
CROWDED = 6.0
"""What being twice as crowded as the mean costs, in mean requests."""
FEW = 8.0
"""Added to the mean number of requests there: with few in flight, a difference of some is chance."""
SPENT = 10.0
"""What having had twice the mean work of late costs, in mean requests."""
MEMORY = 4096
"""Decisions that "of late" reaches back."""
KEPT = 128.0
"""Requests to each instance until half of what it was sent is taken for evicted."""
LEARNING = 1 / 256
"""Weight of the newest request in the mean."""

_EDGES = np.arange(SAMPLES + 1, dtype=np.float64)
_MIDDLES = _EDGES[:-1] + 0.5


class PrefixCost(Policy):
    """Least cost of these four. Their unit is a prompt token's computation, so no setting depends on the tokenizer, on
    the engines' speed or on their number:

    * **what is queued there**: prompts without a first token, less what time has done of them (`Backlog`);
    * **what must be computed there though another instance has it**: once for the request's own wait, and at the
      copy's price `BEHIND` times for those who come behind, and more for what few have asked for;
    * **how crowded it is**: requests in flight, which delay each other's tokens and hold slots. A third of a mean
      request for one more in flight than the usual nine: it decides where nothing is queued;
    * **the work it had of late**: a tenth of a mean request for a hundredth more than the mean. It keeps the fleet even
      when nothing else tells the instances apart.

    Nobody tells the index what engines have evicted: the longer ago a beginning was used by anybody, the less of it is
    expected to be there still, in the choice and in what the request is taken to cost.

    **The price of a copy.** A fixed weight between cache and load is wrong for somebody. With a light load term all who
    begin alike queue at one instance; with a heavy one everybody copies what nobody else will ask for, and the fleet
    drowns in work done twice. What decides is how many share a copy. Of the recent requests a share `s` begins with a
    block. Were its holders to do their part of the work and no more, it would need to be at `s x n` of n instances:
    that is its fair number of copies. Below it, holders are busier than the rest, and another copy pays for itself:
    price 0. From there the price rises, to 1 at `COPIES` times the number. So a head that everybody has spreads as soon
    as there is a queue, and a document that three requests share stays where it is.

    **Who will ask again.** Something that was asked for `u` times so far is taken to be asked for no more with a chance
    of `1/u`: at its full price a copy costs `BEHIND + WASTED / u` a token. So a conversation waits where it was, while
    one of many heads that all are in use moves away from a queue, which evens out whoever happened to get the popular
    ones: a static placement of heads leaves the fleet as uneven as they are popular.

    Ties are drawn. `tokens` is what the instance has to compute for the request: the lease must be taken for that many,
    so that the view's tokens are the work that is queued, and not prompts that are mostly cached.

    Two frontends know nothing of each other's `SPENT`, and need not: each keeps its own requests even.
    """

    def __init__(self, rng: Random, index: PrefixIndex, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(counts_prompts=True)
        self._rng = rng
        self._index = index
        self._clock = clock
        self._backlog = Backlog(index.slots)
        self._fleet = index.slots
        """Candidates of the last choice."""
        self._mean = 0.0
        """Uncached tokens of a request."""
        self._spent: Costs = np.zeros(index.slots)
        """Uncached tokens sent to each slot by this frontend, fading."""

    def pick(self, request: RouteRequest, view: Loads) -> int:
        """Costs are relative: a constant for all candidates is left out."""
        slots, in_flight = view.slots, view.in_flight
        n = self._fleet = len(slots)
        match = self._index.match(request)
        depths = match.depths.take(slots)
        cost = self._backlog.left(slots, view.tokens, self._clock())
        per_block = request.prompt_tokens / max(match.blocks, 1.0)
        cost -= _saved(match, depths) * (per_block * self._kept(match))
        cost += in_flight * (CROWDED * (self._mean or request.prompt_tokens) / (int(in_flight.sum()) / n + FEW))
        cost += self._spent.take(slots) * (SPENT * n / MEMORY)
        self.why = Why(cost, depths, match.blocks)
        return int(slots[least(cost, self._rng)])

    def tokens(self, request: RouteRequest, slot: int) -> int:
        """Prompt tokens that the instance is expected to compute."""
        return round(self._uncached(request, self._index.matched(request), slot))

    def placed(self, request: RouteRequest, slot: int) -> None:
        match = self._index.matched(request)
        uncached = self._uncached(request, match, slot)
        self._index.note(request, slot)
        self._backlog.add(slot, round(uncached), self._clock())
        self._mean = self._mean + LEARNING * (uncached - self._mean) if self._mean else uncached
        self._spent *= 1.0 - 1.0 / MEMORY
        self._spent[slot] += uncached

    def cached(self, request: RouteRequest) -> Mapping[int, int]:
        return self._index.matched(request).cached(request.prompt_tokens)

    def _kept(self, match: Match) -> float:
        """The part of what instances were sent that is expected to be there still."""
        often = KEPT * self._fleet
        return often / (often + match.age)

    def _uncached(self, request: RouteRequest, match: Match, slot: int) -> float:
        sent = request.prompt_tokens * min(match.depths.item(slot) / max(match.blocks, 1.0), 1.0)
        return request.prompt_tokens - sent * self._kept(match)


def _saved(match: Match, depths: NDArray[np.int64]) -> Costs:
    """What each candidate need not compute again, in blocks at their prices, the request's own wait included.

    Prices are taken at `SAMPLES` places of the prompt, between which few requests part: over every block this took
    half of a decision. Of a large fleet few have any of it: they alone are looked at.
    """
    saved = np.zeros(len(depths))
    holders = depths.nonzero()[0]
    if not len(holders):
        return saved
    theirs = depths.take(holders)
    width = theirs.item(theirs.argmax()) / SAMPLES
    middles = (_MIDDLES * width).astype(np.int64)
    uses = np.maximum(match.uses(middles), 1.0)
    again = BEHIND + WASTED / uses
    fair_copies = len(depths) / (match.requests + UNSURE)
    if (uses.item(0) - 1.0) * fair_copies > 1.0 / COPIES:  # else one copy is enough of everything: the usual case
        fair = np.maximum((uses - 1.0) * fair_copies, 1.0 / COPIES)
        copies = len(holders) - np.add.accumulate(np.bincount(theirs)).take(middles)
        again *= np.minimum(np.maximum(copies / fair - 1.0, 0.0) / (COPIES - 1.0), 1.0)
    worth = np.zeros(SAMPLES + 1)
    np.add.accumulate((1.0 + again) * width, out=worth[1:])
    saved[holders] = np.interp(theirs, _EDGES * width, worth)
    return saved
