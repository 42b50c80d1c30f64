"""What a host does for those that wait at it: tells the others of them, answers offers, gives leases back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from broker import wire
from broker.cluster import borrowing, records
from broker.cluster.here import Here
from broker.cluster.records import Offer, Returned
from broker.cluster.stealing import pick
from broker.cluster.store import LETTERS, Store, Told
from broker.scheduler.lines import Ticket
from broker.table import SchedulerEvent
from broker.types import Instance

PUBLISH_S = 0.01
"""Between two publications of new tickets, and so between two rings of the bell."""
MS = 1_000_000


class Offered(NamedTuple):
    """A place that a ticket of ours may have."""

    offer: Offer
    instance: Instance


class Origin:
    """Of one term; the dealings in Redis of `Borrowing`. Each method is one round trip, or none."""

    def __init__(self, here: Here, store: Store, term: str) -> None:
        self._here = here
        self._store = store
        self._term = term
        self._score = 0  # as published
        self.changed = True
        """What is published is out of date."""
        self.publish_at = 0.0
        """Not before."""

    async def publish(self) -> None:
        here, now = self._here, time.monotonic()
        self.changed = False
        tickets, tokens = here.line.waiting
        front = here.line.front(records.WINDOW)
        changes = here.own.changes(front)
        if not (changes.gone or changes.new) and tickets == self._score:
            return
        now_ns = here.clock()
        paces = here.line.paces_ms({ticket.home for _, ticket in front})
        load = records.encode(records.LoadRecord(tickets, tokens, paces))
        least = here.settings.min_load_score
        ring = tickets >= least and (self._score < least or bool(changes.new))
        new = [Told(each.field, max(0, now_ns - each.offered_ns) // MS, each.record) for each in changes.new]
        if new:  # one that only leaves must not hold up the next one that comes
            self.publish_at = now + PUBLISH_S
        await self._store.publish(self._term, tickets, load, changes.gone, new, ring=ring)
        self._score = tickets

    async def answer(self, offers: Sequence[Offered]) -> None:
        """Accepts places that somebody can use, and then gives them to whoever is next."""
        here = self._here
        wanted = []
        for offered, ticket in zip(offers, self._takers(offers), strict=True):
            if ticket is None:
                self._decline(offered.offer)
            else:
                wanted.append(offered)
        if not wanted:
            return
        answers: list[bool] | None = None
        try:
            asked = [(offer.lease, f"{offer.ident}:{offer.version}") for offer, _ in wanted]
            answers = await self._store.accept(self._term, asked)
        finally:
            if answers is None:  # Redis may have done it and not been able to say so
                for offer, _ in wanted:
                    here.own.decline(offer)
        ours = [offered for offered, answer in zip(wanted, answers, strict=True) if answer]
        for (offer, _), ticket in zip(ours, self._takers(ours), strict=True):
            here.own.accepted(offer)
            if ticket is None or here.line.lend(ticket.ident) is None:
                self._decline(offer)
                continue
            here.own.granted(offer, ticket, here.clock())
            here.line.grant_abroad(ticket, wire.RemoteLease(offer.lease, offer.host), offer.name, offer.instance)
        self.changed = True
        here.sweep()

    def _takers(self, offers: Sequence[Offered]) -> list[Ticket | None]:
        """Who is to have which place, as the line is now; they stay in it. None: nobody can use it."""
        here = self._here
        front = here.line.front(records.WINDOW)
        paces = here.line.paces_ms({ticket.home for _, ticket in front})
        line = borrowing.line(front, paces, here.clock())
        tickets = {borrowing.name(ticket.ident): ticket for _, ticket in front}
        leaving: set[str] = set()
        takers: list[Ticket | None] = []
        for _, instance in offers:
            first = pick(instance.role, instance.models, line, here.token_ms, skip=leaving)
            if first is not None:
                leaving.add(first.ident)
            takers.append(tickets[first.ident] if first is not None else None)
        return takers

    def _decline(self, offer: Offer) -> None:
        self._here.own.decline(offer)
        self._here.count(SchedulerEvent.CLUSTER_DECLINED, 1)

    async def give_back(self) -> None:
        """Leases whose requests are over, and offers that were declined."""
        leases = self._here.own.returns[:LETTERS]
        said = [records.encode(Returned(lease.id, lease.used, lease.failed)) for lease in leases]
        await self._store.give_back([(lease.id, lease.thief, word) for lease, word in zip(leases, said, strict=True)])
        self._here.own.gave_back(leases)
