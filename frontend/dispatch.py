"""Which instance gets a request: view, policy, lease. Synchronous, no I/O, tens of microseconds.

There is no `await` between reading the view and taking the lease, so every other frontend sees the choice before
this process does anything else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from broker.config import Config
from broker.counters import FrontendCounters
from broker.errors import NoInstance
from broker.lease import Lease, take
from broker.policies import Options, Policy, frontend_rng, make_policy
from broker.types import Instance, Role, RouteRequest
from broker.view import TableReader, View
from frontend.breaker import Breaker

TAKES = 8
"""Picks whose slot changed before it could be taken, until the request is refused: the fleet cannot churn faster."""


class Choice(msgspec.Struct, frozen=True):
    """An instance, and the lease that counts the request there; whoever gets it closes the lease."""

    instance: Instance
    lease: Lease


class Dispatcher:
    """Chooses instances for one frontend. Owns its policies, their draws and its breaker."""

    def __init__(
        self, table: TableReader, counters: FrontendCounters, policies: Mapping[Role, Policy], breaker: Breaker
    ) -> None:
        self._table = table
        self._counters = counters
        self._policies = policies
        self.breaker = breaker

    def choose(self, request: RouteRequest, tried: Collection[int], now: float) -> Choice:
        """An instance other than those of the slots in `tried`, where there is one.

        Raises `NoInstance` or `ModelNotFound`; nothing is held then.
        """
        for _ in range(TAKES):
            view, slot = self._pick(request, tried, now)
            lease = take(self._table, self._counters, slot, view.generation(slot), request.prompt_tokens)
            if lease is not None:
                self.breaker.tries(slot, now)
                return Choice(self._table.instance(slot), lease)
        raise NoInstance("instances come and go faster than a request can be placed; try again")

    def _pick(self, request: RouteRequest, tried: Collection[int], now: float) -> tuple[View, int]:
        """Not tried and not open; else not tried, the least bad; else, all having been tried, any once more."""
        avoid = {*tried, *self.breaker.open_slots(now)}
        view = self._table.view(request.role, request.model, avoid=avoid)
        if avoid:
            slots: list[int] = view.slots.tolist()
            if slots[0] in avoid:  # then all are: the view leaves out what it may, or nothing
                left = [slot for slot in slots if slot not in tried]
                if left:
                    return view, self.breaker.least_bad(left)
        return view, self._policies[request.role].pick(request, view)


def make_policies(config: Config, index: int) -> dict[Role, Policy]:
    """One policy object per role, so that none shares a turn with another. `index` is the frontend's row."""
    scheduler, workers = config.scheduler, config.server.workers
    names = {
        Role.MIXED: scheduler.policy,
        Role.PREFILL: scheduler.prefill_policy,
        Role.DECODE: scheduler.decode_policy,
    }
    rng = frontend_rng(scheduler.seed, index)
    # A frontend that was swapped in has a row of the same remainder, and keeps its place on the circle.
    offset = index % workers / workers
    return {role: make_policy(name, Options.of(scheduler), rng, offset) for role, name in names.items()}
