"""`fd_remote_metrics_score`: the smallest score from what the engines report."""

from __future__ import annotations

from random import Random

from broker.policies.base import Loads, Options, least
from broker.policies.fd_metrics_score import score
from broker.route import RouteRequest


class FdRemoteMetricsScore:
    """Smallest `running + waiting-weight x waiting`, as reported, so that requests of other routers count too.

    The original fetches both numbers from every engine, one after another, before each decision, and holds a lock over
    all of it. Here they come from the shared table that the scheduler keeps fresh, at no cost per decision, and are
    corrected by what this host's counters have moved since the report: requests sent since then count as running,
    those that ended since then are taken from running first. Without this every frontend sends to the same engine
    until it reports again. A report that is missing or stale is replaced by the live requests, all of them running.
    Ties are drawn.
    """

    def __init__(self, options: Options, rng: Random) -> None:
        self._weight = options.waiting_weight
        self._rng = rng

    def pick(self, request: RouteRequest, view: Loads) -> int:
        return int(view.slots[least(score(view.load, view, self._weight), self._rng)])
