"""The origin's half: what it tells of its line, which offers it takes, and the leases that its requests hold. Pure.

    waits --publish--> named by an offer --+--> accept in Redis --no--> (the place is not ours, nobody has moved)
                                           |       | yes
                                           |    a place for whoever is next by `stealing.pick`: out of the line, and
                                           |    granted to its frontend --> taken --> ended: the lease is returned
                                           |       +--> its client has left, its frontend died: returned at once
                                           +--> nobody can use it, any more: declined

Only the origin sends a request, and only after it took the ticket out of its own line, which it does once. So no race
of offers, whatever Redis loses, can make one run twice. What Redis decides is whether the place is still ours to use;
while it is asked every ticket stays where it is, in reach of the instances here.

A version is drawn each time a ticket is published; the offer that is accepted uses up the version that it names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from broker import wire
from broker.cluster.records import Offer, TicketRecord, Waiting, encode
from broker.scheduler.lines import Ident, Ticket

Peer = tuple[int, int]
"""A frontend: row and life."""

MOST_RETURNS = 4096
"""Kept while Redis is away; the oldest go first. Their leases run out by themselves."""


class Published(NamedTuple):
    """A ticket as thieves see it."""

    field: str
    offered_ns: int
    record: bytes


class Changes(NamedTuple):
    gone: list[str]
    new: list[Published]


class Lease(NamedTuple):
    """One place at another host."""

    id: str
    thief: str
    used: bool = False
    """Its request has been sent there."""
    failed: bool = False
    """The instance failed, or could not be reached."""


@dataclass(slots=True)
class _Granted:
    """Accepted, and its frontend has not said what became of it."""

    lease: Lease
    ticket: Ticket
    since_ns: int


class Borrowing:
    """Owned by the scheduler; the admission queue tells it what frontends say, the member what Redis says."""

    def __init__(self) -> None:
        self._serial = itertools.count(1)
        self._published: dict[Ident, str] = {}  # its field
        self._granted: dict[Ident, _Granted] = {}
        self._running: dict[str, tuple[Lease, Peer]] = {}
        self._returns: dict[str, Lease] = {}

    def __repr__(self) -> str:
        return (
            f"Borrowing({len(self._published)} published, {len(self._granted)} granted, {len(self._running)} running, "
            f"{len(self._returns)} to return)"
        )

    @property
    def is_idle(self) -> bool:
        """Whether no frontend is to react: then time changes nothing."""
        return not self._granted

    # -- the line ------------------------------------------------------------------------------------------

    def changes(self, front: Sequence[tuple[int, Ticket]]) -> Changes:
        """What to publish, so that thieves see exactly `front`. It counts as published from here on."""
        waiting = {ticket.ident for _, ticket in front}
        gone = [self._published.pop(ident) for ident in [i for i in self._published if i not in waiting]]
        new = []
        for order, ticket in front:
            if ticket.ident not in self._published:
                field = f"{name(ticket.ident)}:{next(self._serial)}"
                self._published[ticket.ident] = field
                new.append(Published(field, ticket.offered_ns, encode(_waiting(order, ticket))))
        return Changes(gone, new)

    def forget_published(self) -> None:
        """A new term: nothing of ours is seen."""
        self._published.clear()

    # -- offers --------------------------------------------------------------------------------------------

    def accepted(self, offer: Offer) -> None:
        """The lease is ours. What the offer named is used up, in this version: thieves see it no more."""
        for ident, field in list(self._published.items()):
            if field == f"{offer.ident}:{offer.version}":
                del self._published[ident]

    def granted(self, offer: Offer, ticket: Ticket, now_ns: int) -> None:
        """The ticket, out of the line now, has the place of an accepted offer."""
        self._granted[ticket.ident] = _Granted(Lease(offer.lease, offer.host), ticket, now_ns)

    def decline(self, offer: Offer) -> None:
        """Accepted or not, the place goes back."""
        self._return(Lease(offer.lease, offer.host))

    # -- what frontends say --------------------------------------------------------------------------------

    def __contains__(self, ident: Ident) -> bool:
        """Whether it has left the line for another host, and its frontend has not answered."""
        return ident in self._granted

    def taken(self, ident: Ident) -> None:
        """Its request is on its way there."""
        granted = self._granted.pop(ident, None)
        if granted is not None:
            self._running[granted.lease.id] = granted.lease._replace(used=True), ident[:2]

    def withdrawn(self, ident: Ident) -> bool:
        """Its client has left; False: it is not here."""
        granted = self._granted.pop(ident, None)
        if granted is None:
            return False
        self._return(granted.lease)
        return True

    def returned(self, ident: Ident) -> Ticket | None:
        """The place could not be used: the ticket, to be put back in line."""
        granted = self._granted.pop(ident, None)
        if granted is None:
            return None
        self._return(granted.lease._replace(failed=True))
        return granted.ticket

    def held(self, leases: Iterable[wire.RemoteLease], peer: Peer) -> None:
        """Requests of a frontend run under these; said again to a new scheduler."""
        for each in leases:
            self._running[each.lease] = Lease(each.lease, each.host, used=True), peer

    def ended(self, leases: Iterable[wire.RemoteLease]) -> None:
        for each in leases:
            self._return(Lease(each.lease, each.host, used=True, failed=each.failed))

    def forget(self, peer: Peer) -> int:
        """The frontend is dead: nothing of it runs anywhere. Returns how many of its tickets were on their way."""
        left = [ident for ident in self._granted if ident[:2] == peer]
        for ident in left:
            self.withdrawn(ident)
        for lease, owner in list(self._running.values()):
            if owner == peer:
                self._return(lease)
        return len(left)

    def prune(self, lives: Iterable[Peer]) -> None:
        """Only these frontends live."""
        peers = {ident[:2] for ident in self._granted} | {peer for _, peer in self._running.values()}
        for peer in peers.difference(lives):
            self.forget(peer)

    def unheeded(self, since_ns: int) -> set[Peer]:
        """Frontends that have not reacted to a grant since then."""
        return {ident[:2] for ident, granted in self._granted.items() if granted.since_ns < since_ns}

    # -- leases --------------------------------------------------------------------------------------------

    @property
    def leases(self) -> list[str]:
        """To be renewed."""
        return [granted.lease.id for granted in self._granted.values()] + list(self._running)

    @property
    def returns(self) -> list[Lease]:
        """To be given back, until `gave_back`."""
        return list(self._returns.values())

    def gave_back(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            self._returns.pop(lease.id, None)

    def _return(self, lease: Lease) -> None:
        self._running.pop(lease.id, None)
        self._returns[lease.id] = lease
        while len(self._returns) > MOST_RETURNS:
            del self._returns[next(iter(self._returns))]


def name(ident: Ident) -> str:
    """Of a ticket, within its host's term."""
    return ".".join(map(str, ident))


def line(front: Iterable[tuple[int, Ticket]], paces_ms: dict[int, float], now_ns: int) -> list[TicketRecord]:
    """The head of our own line as the rule of stealing sees it."""
    return [
        TicketRecord(
            name(ticket.ident),
            0,
            ticket.pool[0],
            ticket.model,
            ticket.prompt,
            ticket.prompt - ticket.cost_at(ticket.home),
            ticket.priority,
            max(0, now_ns - ticket.offered_ns) // 1_000_000,
            ticket.home,
            paces_ms.get(ticket.home),
            claimed=False,
        )
        for _, ticket in front
    ]


def _waiting(order: int, ticket: Ticket) -> Waiting:
    cached = ticket.prompt - ticket.cost_at(ticket.home)
    return Waiting(order, ticket.pool[0], ticket.model, ticket.prompt, cached, ticket.priority, ticket.home)
