"""One term of this host in the cluster: a task that takes turns with Redis, woken by what happens here and there.

    beat        every second: we live, leases go on, who else is there
    collect     letters: offers to us, places that came back to us
    give back   leases whose requests are over
    publish     what waits here, when it has changed
    survey      while others have work and we have room: plan, offer

Decisions are in `stealing`, `borrowing` and `lending`; this calls them between two round trips, and never decides on
what it read before one without looking again after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from broker import wire
from broker.cluster import borrowing, records
from broker.cluster.borrowing import Borrowing
from broker.cluster.lending import Lending, Lent
from broker.cluster.records import ForeignRecord, HostLoad, Offer, Returned, TicketRecord
from broker.cluster.stealing import pick, plan
from broker.cluster.store import LETTERS, OFFER_MS, Proposal, Store, Surveyed, Told
from broker.config import Scheduler
from broker.scheduler.lines import Ident, Ticket
from broker.table import SchedulerEvent
from broker.types import Instance

BEAT_S = 1.0
PUBLISH_S = 0.01
"""Between two publications."""
RING_S = 0.05
"""Between two rings of the bell, while tickets come."""
LOOK_S = 0.02
"""How often a host that knows of work looks whether it has room."""
REST_S = 0.5
"""Between two surveys, when there are room and work but the rule sees no gain."""
SETS = 5
"""Sorted sets looked at per survey."""
MOST_OFFERS = 64
"""Per survey."""
MS = 1_000_000

T = TypeVar("T")


class Line(Protocol):
    """What the cluster needs of the admission queue; `broker.scheduler.admission.Admission` is the real one."""

    @property
    def waiting(self) -> tuple[int, int]: ...
    def front(self, limit: int) -> list[tuple[int, Ticket]]: ...
    def paces_ms(self, slots: set[int]) -> dict[int, float]: ...
    def lend(self, ident: Ident) -> Ticket | None: ...
    def put_back(self, ticket: Ticket, now_ns: int) -> None: ...
    def grant_abroad(self, ticket: Ticket, lease: wire.RemoteLease, name: str, instance: bytes) -> None: ...


class Peer(NamedTuple):
    """Another host, as of the last beat. For people."""

    id: str
    name: str
    tickets: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Here:
    """This host, for all its terms."""

    settings: Scheduler
    id: str
    """Unique to this run."""
    name: str
    """For people."""
    machine: str
    line: Line
    own: Borrowing
    lending: Lending
    count: Callable[[SchedulerEvent, int], None]
    sweep: Callable[[], None]
    """Lets the queue look again, soon."""
    lives: Callable[[], list[tuple[int, int]]]
    """The frontends that there are, by row and life."""
    met: Callable[[list[Peer]], None] = lambda _: None
    """Hears who else is there, at each beat."""


class Term:
    """Owned by the member, from `join` to the first error."""

    def __init__(self, here: Here, store: Store, term: str) -> None:
        self._here = here
        self._store = store
        self._term = term
        self._rng = Random(term)
        self._awake = asyncio.Event()
        self._letters = True  # some may have come
        self._changed = True  # what is published is out of date
        self._score = 0  # as published
        self._hungry = True  # somebody may have work
        self._others = 0
        self._sets = here.settings.load_shards_num
        self._rest = LOOK_S
        self._beat_at = self._publish_at = self._ring_at = self._survey_at = 0.0

    def poke(self) -> None:
        """The line has changed, or leases are to be returned."""
        self._changed = True
        self._awake.set()

    def wake(self, *, letter: bool) -> None:
        """Somebody has written to us; else somebody has work, or has come."""
        if letter:
            self._letters = True
        else:
            self._hungry = True
            self._rest = LOOK_S
            self._survey_at = 0.0
        self._awake.set()

    async def turns(self) -> None:
        """Never returns. Raises StoreAway, TermOver."""
        while True:
            self._awake.clear()
            await self._turn()
            due = [self._beat_at]
            if self._changed and self._others:
                due.append(self._publish_at)
            if self._hungry:
                due.append(self._survey_at)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(due) - time.monotonic())):
                    await self._awake.wait()

    async def _turn(self) -> None:
        if time.monotonic() >= self._beat_at:
            await self._beat()
            self._letters = True
        if self._letters:
            await self._collect()
        if self._here.own.returns:
            await self._give_back()
        if self._changed and self._others and time.monotonic() >= self._publish_at:
            await self._publish()
        if self._hungry and time.monotonic() >= self._survey_at:
            await self._survey()

    # -- beats ---------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        here = self._here
        here.own.prune(here.lives())
        lent = here.lending.leases
        beat = await self._store.beat(self._term, here.own.leases, [(each.lease, each.note) for each in lent])
        now = time.monotonic()
        now_ns = time.monotonic_ns()
        for each, left_ms in zip(lent, beat.left_ms, strict=True):
            if left_ms > 0:
                here.lending.renewed(each.lease, now_ns + left_ms * MS)
        peers = []
        for member in beat.members:
            record = self._read(records.as_host, member.record)
            load = self._read(records.as_load, member.load) if member.load else records.LoadRecord(0, 0)
            if record is not None and load is not None:
                peers.append(Peer(member.id, record.name, load.tickets, load.tokens))
                self._sets = max(self._sets, min(record.shards, records.MOST_SETS))
        here.met(peers)
        if len(peers) > self._others:
            self._changed = True
        self._others = len(peers)
        if any(peer.tickets >= here.settings.min_load_score for peer in peers):
            self._hungry = True
        self._beat_at = now + BEAT_S

    # -- letters -------------------------------------------------------------------------------------------

    async def _collect(self) -> None:
        self._letters = False
        letters = await self._store.collect(self._term)
        self._letters = len(letters) >= LETTERS
        offers = []
        freed = False
        for data in letters:
            match self._read(records.as_letter, data):
                case Offer() as offer:
                    instance = self._read(records.as_instance, offer.instance)
                    if instance is not None:
                        offers.append((offer, instance))
                case Returned(lease=lease, used=used, failed=failed) if self._here.lending.end(lease, failed=failed):
                    self._here.count(SchedulerEvent.CLUSTER_RETURNED, 1)
                    self._here.count(SchedulerEvent.CLUSTER_LENT, used)
                    freed = True
        if freed:
            self._here.sweep()
            if self._hungry:
                self._survey_at = 0.0
        if offers:
            await self._answer(offers)

    async def _answer(self, offers: Sequence[tuple[Offer, Instance]]) -> None:
        """Gives each place that is offered to whoever is next and can use it."""
        here = self._here
        token_ms = 1e3 / here.settings.prefill_tokens_per_sec
        front = here.line.front(records.WINDOW)
        found = self._own_line(front)
        idents = {borrowing.name(ticket.ident): ticket.ident for _, ticket in front}
        leaving: set[str] = set()
        taken: list[tuple[Offer, Ticket]] = []
        for offer, instance in offers:
            next_up = pick(instance.role, instance.models, found, token_ms, skip=leaving)
            ticket = here.line.lend(idents[next_up.ident]) if next_up is not None else None
            if ticket is None:
                here.own.decline(offer)
                here.count(SchedulerEvent.CLUSTER_DECLINED, 1)
                continue
            leaving.add(borrowing.name(ticket.ident))
            here.own.accepting(offer, ticket)
            taken.append((offer, ticket))
        if not taken:
            return
        self._changed = True
        asked = [(offer.lease, f"{offer.ident}:{offer.version}") for offer, _ in taken]
        answers = await self._store.accept(self._term, asked)
        now_ns = time.monotonic_ns()
        for (offer, ticket), ours in zip(taken, answers, strict=True):
            if ours and here.own.accepted(ticket.ident, now_ns):
                lease = wire.RemoteLease(offer.lease, offer.host)
                here.line.grant_abroad(ticket, lease, offer.name, offer.instance)
            elif not ours and here.own.refused(ticket.ident) is not None:
                here.line.put_back(ticket, now_ns)
        here.sweep()

    def _own_line(self, front: Sequence[tuple[int, Ticket]]) -> list[TicketRecord]:
        paces = self._here.line.paces_ms({ticket.home for _, ticket in front})
        return borrowing.line(front, paces, time.monotonic_ns())

    async def _give_back(self) -> None:
        leases = self._here.own.returns[:LETTERS]
        letters = [
            (lease.id, lease.thief, records.encode(Returned(lease.id, lease.used, lease.failed))) for lease in leases
        ]
        await self._store.give_back(letters)
        self._here.own.gave_back(leases)

    # -- what waits here -----------------------------------------------------------------------------------

    async def _publish(self) -> None:
        here, now = self._here, time.monotonic()
        self._changed = False
        tickets, tokens = here.line.waiting
        front = here.line.front(records.WINDOW)
        changes = here.own.changes(front)
        if not (changes.gone or changes.new) and tickets == self._score:
            return
        now_ns = time.monotonic_ns()
        paces = here.line.paces_ms({ticket.home for _, ticket in front})
        load = records.encode(records.LoadRecord(tickets, tokens, paces))
        least = here.settings.min_load_score
        ring = tickets >= least and (self._score < least or (bool(changes.new) and now >= self._ring_at))
        new = [Told(each.field, max(0, now_ns - each.offered_ns) // MS, each.record) for each in changes.new]
        self._publish_at = now + PUBLISH_S
        await self._store.publish(self._term, tickets, load, changes.gone, new, ring=ring)
        self._score = tickets
        if ring:
            self._ring_at = now + RING_S

    # -- what waits elsewhere ------------------------------------------------------------------------------

    async def _survey(self) -> None:
        here = self._here
        self._survey_at = time.monotonic() + LOOK_S
        if not here.lending.places():
            return
        sets = self._rng.sample(range(self._sets), min(SETS, self._sets))
        found = await self._store.survey(here.settings.min_load_score, sets)
        hosts = [host for surveyed in found if (host := self._host_load(surveyed)) is not None]
        self._hungry = bool(hosts) or self._sets > SETS
        thefts = plan(
            here.lending.places(),
            hosts,
            min_load_score=here.settings.min_load_score,
            token_ms=1e3 / here.settings.prefill_tokens_per_sec,
            most=MOST_OFFERS,
            rng=self._rng,
        )
        proposals = []
        until_ns = time.monotonic_ns() + OFFER_MS * MS
        for theft in thefts:
            with contextlib.suppress(KeyError):  # the instance has left
                instance = records.encode_instance(here.lending.instance(theft.slot))
                lent = here.lending.begin(theft.slot, self._term, until_ns)
                proposals.append(self._proposal(theft.victim, theft.ticket, lent, instance))
        if not proposals:
            self._rest = min(REST_S, 2 * self._rest)
            self._survey_at = time.monotonic() + self._rest
            return
        answers = await self._store.offer(self._term, proposals)
        for proposal, answer in zip(proposals, answers, strict=True):
            if answer == 1:
                here.count(SchedulerEvent.CLUSTER_OFFERED, 1)
            else:
                here.lending.end(proposal.lease)
        self._rest = LOOK_S
        if 1 not in answers:  # others were faster; what is left now is another picture
            self._survey_at = time.monotonic() + self._rng.uniform(0.0, LOOK_S)

    def _proposal(self, victim: HostLoad, ticket: TicketRecord, lent: Lent, instance: bytes) -> Proposal:
        here = self._here
        letter = Offer(lent.lease, here.id, here.name, ticket.ident, ticket.version, instance)
        field = f"{ticket.ident}:{ticket.version}"
        return Proposal(victim.host, victim.term, field, lent.lease, lent.note, records.encode(letter))

    def _host_load(self, found: Surveyed) -> HostLoad | None:
        self._here.count(SchedulerEvent.CLUSTER_IGNORED, found.foreign)
        record = self._read(records.as_host, found.record)
        load = self._read(records.as_load, found.load)
        if record is None or load is None:
            return None
        waiting = []
        for field, (waited_ms, data) in found.tickets.items():
            ticket = self._read(records.as_waiting, data)
            named = _named(field)
            if ticket is None or named is None:
                continue
            waiting.append((ticket.order, _record(*named, waited_ms, ticket, load, field in found.claimed)))
        waiting.sort(key=_order)
        line = tuple(ticket for _, ticket in waiting)
        return HostLoad(found.id, found.term, record.machine, load.tickets, load.tokens, line)

    def _read(self, decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T | None:
        try:
            return records.decode(decoder, data)
        except ForeignRecord:
            self._here.count(SchedulerEvent.CLUSTER_IGNORED, 1)
            return None


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
