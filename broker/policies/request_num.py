"""`request_num`: the candidate with the fewest requests."""

from __future__ import annotations

from random import Random

from broker.policies.base import Loads
from broker.policies.draw import least
from broker.route import RouteRequest


class RequestNum:
    """Fewest live requests of all frontends.

    The original's rule, which takes the first of several equals, so that requests sent one after another all go to one
    instance. Here ties are drawn. It needs counters that are true at this moment: on a copy refreshed every 100 ms
    all frontends send to the same least loaded instance until the next copy, which balances worse than `random`.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def pick(self, request: RouteRequest, view: Loads) -> int:
        return view.listed[least(view.requests, self._rng)]
