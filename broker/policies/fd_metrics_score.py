"""`fd_metrics_score`: the smallest score from this host's own requests."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray

from broker.policies.base import Loads, Options, Vector, least
from broker.route import RouteRequest
from broker.types import Trust

_STALE = int(Trust.STALE)


class FdMetricsScore:
    """Smallest `running + waiting-weight x waiting`, over the live requests of all frontends.

    The original takes its request counter for `running` and always 0 for `waiting`, so that the weight never counts.
    Here `waiting` is what the engine last reported, but no more than is in flight, and `running` is the rest of the
    live requests: none is counted twice, and with weight 1 the score is that of `request_num`, as the original's. An
    engine whose report is missing or stale has no known waiting requests. Ties are drawn.
    """

    def __init__(self, options: Options, rng: Random) -> None:
        self._weight = options.waiting_weight
        self._rng = rng

    def pick(self, request: RouteRequest, view: Loads) -> int:
        return int(view.slots[least(score(view.in_flight, view, self._weight), self._rng)])


def score(requests: Vector, view: Loads, weight: float) -> NDArray[np.int64] | NDArray[np.float64]:
    """`running + weight x waiting`, where `requests` is the sum of the two.

    As floats, because weights are fractions and numbers at the end of the range must not wrap around; exact below
    2^53.
    """
    if weight == 1.0:
        return requests
    waiting = np.minimum(view.waiting, requests)
    np.maximum(waiting, 0, out=waiting)  # -1 is unknown
    waiting *= view.trust != _STALE  # half the time of assigning 0 through a mask
    return requests + (weight - 1.0) * waiting
