"""What a host with room does for those that wait at others: looks who has work, and offers places.

    survey --> plan --> offer --> (the origin answers, and returns the place at the end)

A place is offered when nobody here needs it. Or it is *set aside*, in the moment when one of our own would get it, for
one who has waited much longer elsewhere by the last survey; the next one, at once, tells whether that is still so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from random import Random

from broker.cluster import records
from broker.cluster.here import Here
from broker.cluster.lending import Lent
from broker.cluster.locality import is_local
from broker.cluster.records import HostLoad, Offer, TicketRecord
from broker.cluster.stealing import is_elder, pick, plan
from broker.cluster.store import OFFER_MS, Proposal, Store, Surveyed
from broker.table import SchedulerEvent

LOOK_S = 0.02
"""How often a host that knows of work looks whether it has room."""
HEARD_S = 0.004
"""Between two surveys, when the bells of many hosts ring."""
REST_S = 0.5
"""Between two surveys, when there are room and work but the rule sees no gain."""
WATCH_S = 1.0
"""Between two surveys, when there is work elsewhere and no room."""
RECENT_S = 2.0
"""A survey that old still tells whether somebody waits much longer elsewhere."""
REFUSED_S = 0.1
"""Nothing is set aside so soon after what was set aside was not wanted."""
SETS = 5
"""Sorted sets looked at per survey."""
MOST_OFFERS = 64
"""Per survey."""
MS = 1_000_000


class Thief:
    """Of one term; the dealings in Redis of `Lending`."""

    def __init__(self, here: Here, store: Store, term: str) -> None:
        self._here = here
        self._store = store
        self._term = term
        self._rng = Random(term)
        self._rest = LOOK_S
        self._surveyed_at = 0.0
        self._hosts: list[HostLoad] = []  # that had work then
        self._aside: list[Lent] = []  # to be offered by the next survey
        self._refused_at = 0.0
        self._heard = False  # since the last survey began
        self.sets = here.settings.load_shards_num
        """Sorted sets that any member uses."""
        self.hungry = True
        """Somebody may have work."""
        self.survey_at = 0.0
        """Not before."""

    def close(self) -> None:
        """What was set aside is ours again."""
        self._keep_aside()

    def heard(self) -> None:
        """Somebody has work, or has come."""
        self.hungry = self._heard = True
        self._rest = LOOK_S
        self.survey_at = min(self.survey_at, self._surveyed_at + HEARD_S)

    def returned(self, lease: str, *, used: bool, failed: bool) -> bool:
        """A place of ours came back; False: it was ours already."""
        if not self._here.lending.end(lease, failed=failed):
            return False
        self._here.count(SchedulerEvent.CLUSTER_RETURNED, 1)
        self._here.count(SchedulerEvent.CLUSTER_LENT, used)
        if not used:
            self._refused_at = time.monotonic()
        if self.hungry:
            self.survey_at = 0.0
        return True

    # -- places that our own could have --------------------------------------------------------------------

    def yields(self, slot: int) -> bool:
        """A place is free that one of our own could have: whether it is set aside for an elder of another host."""
        now = time.monotonic()
        if not self._hosts or now - self._surveyed_at > RECENT_S or now - self._refused_at < REFUSED_S:
            return False
        own_ms = self._own_waited_ms()
        try:
            if own_ms is None or not self._has_elder(slot, own_ms, int((now - self._surveyed_at) * 1e3)):
                return False
            self._aside.append(self._begin(slot))
        except KeyError:  # it has just left
            return False
        self.hungry = True
        self.survey_at = 0.0
        return True

    def _has_elder(self, slot: int, own_ms: int, since_ms: int) -> bool:
        """Whether somebody whom the place could serve has waited so much longer than `own_ms`.

        By the last survey, which is `since_ms` old.
        """
        here = self._here
        instance = here.lending.instance(slot)
        local = is_local(instance.url)
        for host in self._hosts:
            if local and host.machine != here.machine:
                continue
            first = pick(instance.role, instance.models, host.line, here.token_ms)
            if first is not None and is_elder(first.waited_ms + since_ms, own_ms):
                return True
        return False

    def _own_waited_ms(self) -> int | None:
        front = self._here.line.front(1)
        return max(0, self._here.clock() - front[0][1].offered_ns) // MS if front else None

    def _keep_aside(self) -> None:
        """Nobody wants what was set aside, or it cannot be offered."""
        if self._aside:
            self._refused_at = time.monotonic()
            for lent in self._aside:
                self._here.lending.end(lent.lease)
            self._aside.clear()
            self._here.sweep()

    # -- surveys -------------------------------------------------------------------------------------------

    async def survey(self) -> None:
        """Who has work, and what we offer them. Two round trips, one where there is nothing to offer, or none."""
        here = self._here
        began = time.monotonic()
        self.survey_at = began + LOOK_S
        if not self._aside and not here.lending.places() and began - self._surveyed_at < WATCH_S:
            return
        self._heard = False
        sets = self._rng.sample(range(self.sets), min(SETS, self.sets))
        found = await self._store.survey(here.settings.min_load_score, sets)
        hosts = [host for surveyed in found if (host := self._host_load(surveyed)) is not None]
        self.hungry = bool(hosts) or self.sets > SETS or self._heard
        self._surveyed_at = time.monotonic()
        self._hosts = hosts
        proposals = self._proposals(hosts)
        self._keep_aside()
        if not proposals:
            if not self._heard:
                self._rest = min(REST_S, 2 * self._rest)
                self.survey_at = time.monotonic() + self._rest
            return
        answers = await self._store.offer(self._term, proposals)
        offered = answers.count(1)
        here.count(SchedulerEvent.CLUSTER_OFFERED, offered)
        self._rest = LOOK_S
        if offered < len(proposals):
            for proposal, answer in zip(proposals, answers, strict=True):
                if answer != 1:
                    here.lending.end(proposal.lease)
            # Others were faster; what is left now is another picture.
            self._refused_at = time.monotonic()
            self.survey_at = self._refused_at + self._rng.uniform(0.0, LOOK_S)
            here.sweep()

    def _proposals(self, hosts: Sequence[HostLoad]) -> list[Proposal]:
        """What to offer whom, by the rule; each place is reserved from here on."""
        here = self._here
        aside: dict[int, list[Lent]] = {}
        for lent in self._aside:
            aside.setdefault(lent.slot, []).append(lent)
        thefts = plan(
            here.lending.places({slot: len(places) for slot, places in aside.items()}, self._own_waited_ms()),
            hosts,
            min_load_score=here.settings.min_load_score,
            token_ms=here.token_ms,
            most=MOST_OFFERS,
            rng=self._rng,
        )
        proposals = []
        for slot, victim, ticket in thefts:
            if places := aside.get(slot):
                lent = places.pop()
                self._aside.remove(lent)
            else:
                lent = self._begin(slot)
            proposals.append(self._proposal(victim, ticket, lent))
        return proposals

    def _begin(self, slot: int) -> Lent:
        return self._here.lending.begin(slot, self._term, self._here.clock() + OFFER_MS * MS)

    def _proposal(self, victim: HostLoad, ticket: TicketRecord, lent: Lent) -> Proposal:
        here = self._here
        instance = records.encode_instance(here.lending.instance(lent.slot))
        letter = Offer(lent.lease, here.id, here.name, ticket.ident, ticket.version, instance)
        field = f"{ticket.ident}:{ticket.version}"
        return Proposal(victim.host, victim.term, field, lent.lease, lent.note, records.encode(letter))

    def _host_load(self, found: Surveyed) -> HostLoad | None:
        here = self._here
        here.count(SchedulerEvent.CLUSTER_IGNORED, found.foreign)
        record = here.read(records.as_host, found.record)
        load = here.read(records.as_load, found.load)
        if record is None or load is None:
            return None
        waiting = []
        for field, (waited_ms, data) in found.tickets.items():
            ticket = here.read(records.as_waiting, data)
            named = _named(field)
            if ticket is not None and named is not None:
                waiting.append((ticket.order, _record(*named, waited_ms, ticket, load, field in found.claimed)))
        waiting.sort(key=_order)
        line = tuple(ticket for _, ticket in waiting)
        return HostLoad(found.id, found.term, record.machine, load.tickets, load.tokens, line)


def _named(field: str) -> tuple[str, int] | None:
    ident, _, version = field.rpartition(":")
    return (ident, int(version)) if ident and version.isdecimal() and len(version) < 19 else None


def _record(
    ident: str, version: int, waited_ms: int, ticket: records.Waiting, load: records.LoadRecord, claimed: bool
) -> TicketRecord:
    return TicketRecord(
        ident,
        version,
        ticket.role,
        ticket.model,
        ticket.prompt,
        ticket.cached,
        ticket.priority,
        waited_ms,
        ticket.home,
        load.paces_ms.get(ticket.home),
        claimed,
    )


def _order(item: tuple[int, TicketRecord]) -> int:
    return item[0]
