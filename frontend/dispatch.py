"""Which instance gets a request: view, policy, lease. Synchronous, no I/O, tens of microseconds.

There is no `await` between reading the view and taking the lease, so every other frontend sees the choice before
this process does anything else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mypy_extensions import mypyc_attr

from broker.config import Config
from broker.counters import FrontendCounters
from broker.errors import NoInstance
from broker.lease import Lease, take
from broker.policies import Options, Policy, frontend_rng, in_use, make_policy
from broker.policies.base import Why
from broker.prefix import PrefixIndex
from broker.route import RouteRequest
from broker.types import Instance, Role
from broker.view import TableReader, View
from frontend.breaker import Breaker
from frontend.sessions import Sessions
from frontend.upstream.base import Call, Sink, UpstreamRequest, Upstreams

TAKES = 8
"""Picks whose slot changed before it could be taken, until the request is refused: the fleet cannot churn faster."""


RETRIED_STATUSES = frozenset((502, 503))
"""An engine, or what stands in front of it, says that it cannot take the request: another one may."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Chosen:
    """Who got a request: one instance (`Choice`), or a pair (`frontend.pair`). A base class, as `Sink` is one."""

    def __init__(self, instance: Instance, lease: Lease) -> None:
        self.instance = instance
        """Whose answer is the client's."""
        self.lease = lease
        """Counts the request there; whoever has the choice closes it."""

    @property
    def suspects(self) -> Collection[Lease]:
        """Who is to blame, and not to be tried again, if the attempt fails now. At least one."""
        return (self.lease,)

    @property
    def retried(self) -> Collection[int]:
        """Statuses after which the request may be tried elsewhere."""
        return RETRIED_STATUSES

    @property
    def where(self) -> str:
        """For log lines."""
        return self.instance.url

    @property
    def legs(self) -> tuple[Choice, ...]:
        """Each instance, and the lease that counts the request there; in the order of choice."""
        raise NotImplementedError

    def open(self, upstreams: Upstreams, request: UpstreamRequest, sink: Sink) -> Call:
        """Sends the request; the contract of `Upstream.open`."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Chooser:
    """What a request needs to find its instance. A base class, as `Sink` is one."""

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker

    def choose(self, request: RouteRequest, tried: Collection[int], now: float) -> Chosen:
        """Others than the slots in `tried`, where there are any. Raises `PenstockError`; nothing is held then."""
        raise NotImplementedError

    def placed(self, request: RouteRequest, chosen: Chosen) -> None:
        """The request is being sent there, however it was chosen. Whoever forwards says so of every attempt."""
        raise NotImplementedError


class Considered:
    """What a choice was made of, for whoever asks later. Its vectors stay as they were."""

    def __init__(self, view: View, why: Why | None, left_out: Collection[int], role: Role) -> None:
        """`left_out`: slots that had been tried, were suspected, or did not fit."""
        self.view = view
        self.why = why
        self.left_out = left_out
        self.role = role


class Choice(Chosen):
    """An instance, and the lease that counts the request there."""

    def __init__(
        self,
        instance: Instance,
        lease: Lease,
        view: View | None = None,
        why: Why | None = None,
        left_out: Collection[int] = (),
    ) -> None:
        """What it was made of, as in `Considered`. No `view`: nobody chose, it was granted."""
        super().__init__(instance, lease)
        self._view = view
        self._why = why
        self._left_out = left_out

    @property
    def considered(self) -> Considered | None:
        """Made for whoever asks, as nearly nobody does; None: nobody chose."""
        view = self._view
        return None if view is None else Considered(view, self._why, self._left_out, self.instance.role)

    @property
    def legs(self) -> tuple[Choice, ...]:
        return (self,)

    def open(self, upstreams: Upstreams, request: UpstreamRequest, sink: Sink) -> Call:
        return upstreams.upstream(self.instance).open(self.instance, request, sink)


class RemoteChoice(Choice):
    """An instance of another host, and the lease of the place there."""

    def __init__(self, instance: Instance, lease: Lease, host: str) -> None:
        """`host`: for people."""
        super().__init__(instance, lease)
        self.host = host

    @property
    def where(self) -> str:
        return f"{self.instance.url}@{self.host}"


class Dispatcher(Chooser):
    """Chooses instances for one frontend. Owns its policies, their draws and its breaker."""

    def __init__(
        self, table: TableReader, counters: FrontendCounters, policies: Mapping[Role, Policy], breaker: Breaker
    ) -> None:
        super().__init__(breaker)
        self._table = table
        self._counters = counters
        self._policies = policies
        self.sessions: Mapping[Role, Sessions] = {}
        """Roles whose policy remembers prompts; set by the frontend's process."""

    def choose(self, request: RouteRequest, tried: Collection[int], now: float, unfit: Collection[int] = ()) -> Choice:
        """An instance other than those of the slots in `tried`, where there is one, and never one of `unfit`.

        Raises `NoInstance` or `ModelNotFound`; nothing is held then.
        """
        table, breaker, role = self._table, self.breaker, request.role
        policy = self._policies[role]
        for _ in range(TAKES):
            why: Why | None
            avoid: Collection[int]
            if tried or unfit or breaker.suspects:
                view, slot, why, avoid = self._pick(request, tried, now, unfit)
            else:
                view = table.view(role, request.model)
                slot, why, avoid = policy.pick(request, view), policy.why, ()
            lease = take(table, self._counters, slot, view.generation(slot), policy.tokens(request, slot))
            if lease is not None:
                lease.counts_prompt = policy.counts_prompts
                if breaker.suspects:
                    breaker.tries(slot, now)
                return Choice(table.instance(slot), lease, view, why, avoid)
        raise NoInstance("instances come and go faster than a request can be placed; try again")

    def claim(self, request: RouteRequest, slot: int, generation: int, now: float) -> Choice | None:
        """That very instance, whatever the policy says; None: it has changed."""
        instance = self._table.find(slot, generation)
        if instance is None:
            return None
        policy = self._policies[request.role]
        lease = take(self._table, self._counters, slot, generation, policy.tokens(request, slot))
        if lease is None:
            return None
        lease.counts_prompt = policy.counts_prompts
        self.breaker.tries(slot, now)
        return Choice(instance, lease)

    def placed(self, request: RouteRequest, chosen: Chosen) -> None:
        slot = chosen.lease.slot
        self._policies[request.role].placed(request, slot)
        if request.session and request.role in self.sessions:
            self.sessions[request.role].chosen(request.session, chosen.instance.url)

    def cached(self, request: RouteRequest) -> Mapping[int, int]:
        """Tokens of its prompt that instances have been sent before, by slot, as far as the role's policy looks."""
        return self._policies[request.role].cached(request)

    def _pick(
        self, request: RouteRequest, tried: Collection[int], now: float, unfit: Collection[int]
    ) -> tuple[View, int, Why | None, Collection[int]]:
        """Not tried and not open; else not tried, the least bad; else, all having been tried, any once more.

        What was seen, the slot, why, and what was left out."""
        avoid = {*tried, *self.breaker.open_slots(now), *unfit}
        view = self._table.view(request.role, request.model, avoid=avoid)
        if avoid:
            slots: list[int] = view.slots.tolist()
            if slots[0] in avoid:  # then all are: the view leaves out what it may, or nothing
                fit = [slot for slot in slots if slot not in unfit]
                if not fit:
                    raise NoInstance(f"no {request.role.name.lower()} instance fits its counterpart")
                left = [slot for slot in fit if slot not in tried]
                if left:
                    return view, self.breaker.least_bad(left), None, avoid
                if unfit:
                    view = self._table.view(request.role, request.model, avoid=unfit)
        policy = self._policies[request.role]
        slot = policy.pick(request, view)
        return view, slot, policy.why, avoid


def make_policies(config: Config, index: int, prefixes: PrefixIndex | None = None) -> dict[Role, Policy]:
    """One policy object per role in use, so that none shares a turn with another. `index` is the frontend's row.

    `prefixes` is shared by all of them; there is one if `need_index` says so.
    """
    scheduler, workers = config.scheduler, config.server.workers
    rng = frontend_rng(scheduler.seed, index)
    # A frontend that was swapped in has a row of the same remainder, and keeps its place on the circle.
    offset = index % workers / workers
    options = Options.of(scheduler)
    return {role: make_policy(name, options, rng, offset, prefixes) for role, name in in_use(config).items()}
