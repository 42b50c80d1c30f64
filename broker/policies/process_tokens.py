"""`process_tokens`: the candidate with the fewest prompt tokens at work."""

from __future__ import annotations

from random import Random

from broker.policies.base import Loads, least
from broker.route import RouteRequest


class ProcessTokens:
    """Smallest sum of prompt tokens over the live requests of all frontends.

    The original's rule, which takes the first of several equals, for instance for all requests whose prompts have no
    text. Here ties are drawn.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def pick(self, request: RouteRequest, view: Loads) -> int:
        return int(view.slots[least(view.tokens, self._rng)])
