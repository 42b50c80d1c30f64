"""What a host does for those that wait at it: tells the others of them, answers offers, gives leases back."""

from __future__ import annotations

import time
from collections.abc import Sequence

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
"""Between two publications."""
RING_S = 0.05
"""Between two rings of the bell, while tickets come."""
MS = 1_000_000


class Origin:
    """Of one term; the dealings in Redis of `Borrowing`. Each method is one round trip, or none."""

    def __init__(self, here: Here, store: Store, term: str) -> None:
        self._here = here
        self._store = store
        self._term = term
        self._score = 0  # as published
        self._ring_at = 0.0
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
        ring = tickets >= least and (self._score < least or (bool(changes.new) and now >= self._ring_at))
        new = [Told(each.field, max(0, now_ns - each.offered_ns) // MS, each.record) for each in changes.new]
        self.publish_at = now + PUBLISH_S
        await self._store.publish(self._term, tickets, load, changes.gone, new, ring=ring)
        self._score = tickets
        if ring:
            self._ring_at = now + RING_S

    async def answer(self, offers: Sequence[tuple[Offer, Instance]]) -> None:
        """Gives each place that is offered to whoever is next and can use it."""
        here = self._here
        taken = self._taken(offers)
        if not taken:
            return
        self.changed = True
        asked = [(offer.lease, f"{offer.ident}:{offer.version}") for offer, _ in taken]
        answers = await self._store.accept(self._term, asked)
        now_ns = here.clock()
        for (offer, ticket), ours in zip(taken, answers, strict=True):
            if ours and here.own.accepted(ticket.ident, now_ns):
                lease = wire.RemoteLease(offer.lease, offer.host)
                here.line.grant_abroad(ticket, lease, offer.name, offer.instance)
            elif not ours and here.own.refused(ticket.ident) is not None:
                here.line.put_back(ticket, now_ns)
        here.sweep()

    def _taken(self, offers: Sequence[tuple[Offer, Instance]]) -> list[tuple[Offer, Ticket]]:
        """Who is to have which place: out of the line already. Offers that nobody can use are declined."""
        here = self._here
        front = here.line.front(records.WINDOW)
        paces = here.line.paces_ms({ticket.home for _, ticket in front})
        line = borrowing.line(front, paces, here.clock())
        idents = {borrowing.name(ticket.ident): ticket.ident for _, ticket in front}
        leaving: set[str] = set()
        taken = []
        for offer, instance in offers:
            first = pick(instance.role, instance.models, line, here.token_ms, skip=leaving)
            ticket = here.line.lend(idents[first.ident]) if first is not None else None
            if first is None or ticket is None:
                here.own.decline(offer)
                here.count(SchedulerEvent.CLUSTER_DECLINED, 1)
                continue
            leaving.add(first.ident)
            here.own.accepting(offer, ticket)
            taken.append((offer, ticket))
        return taken

    async def give_back(self) -> None:
        """Leases whose requests are over, and offers that were declined."""
        leases = self._here.own.returns[:LETTERS]
        said = [records.encode(Returned(lease.id, lease.used, lease.failed)) for lease in leases]
        await self._store.give_back([(lease.id, lease.thief, word) for lease, word in zip(leases, said, strict=True)])
        self._here.own.gave_back(leases)
