"""The queue's place in the scheduler: tickets of frontends in, grants out. Sockets and clock are the shell's.

    frontend                                      here                                        shared memory
    Tickets.offered  ---------------------------> queue.offer
                                                  sweep: room by `broker.saturation`
                     <-------------------- Grants queue.grant, a place reserved               RESERVED + 1
    lease                                                                                     STARTED + 1
    Tickets.taken    --------------------------->                                             RESERVED - 1
      or .returned   ---------------------------> queue.put_back                              RESERVED - 1

From the grant to the lease the place is counted as reserved, and for a moment both ways: an instance may look one
request fuller than it is, never emptier. While tickets wait, the instances that could serve them are HELD: requests
that come now are offered too, instead of overtaking those in line.

Nothing here outlives the scheduler. The next one finds no tickets and no reservations; the frontends see its epoch and
offer again whatever waits, and each ticket stands where it stood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple, Protocol

from broker import wire
from broker.config import Scheduler
from broker.errors import ModelNotFound, NoInstance, QueueFull
from broker.saturation import Saturation
from broker.scheduler.lines import Ident, Peer, Pool, Ticket
from broker.scheduler.queue import AdmissionQueue, Grant
from broker.table import Column, QueueColumn, SchedulerEvent
from broker.view import TableReader

LOWEST_PRIORITY = 9
MOST_TOKENS = 1 << 40
PATIENCE_NS = 1_500_000_000
"""How long a new scheduler waits for the tickets of every frontend before it grants the first one."""
HEED_NS = 2_000_000_000
"""A frontend that does not react to a grant for this long is stopped, or dead: its tickets leave the line."""
PER_MESSAGE = 256
"""Answers of a kind in one message."""


class Outlet(Protocol):
    """What the shell does for the queue."""

    def __call__(self, address: bytes, message: wire.Grants) -> None:
        """Sends without waiting. A message that is lost costs its frontend the grace of `HEED_NS`, nothing more."""


class Abroad(Protocol):
    """What becomes of tickets that leave the line for another host; `broker.cluster.borrowing` is the real one."""

    @property
    def is_idle(self) -> bool: ...
    def __contains__(self, ident: Ident) -> bool: ...
    def taken(self, ident: Ident) -> None: ...
    def withdrawn(self, ident: Ident) -> bool: ...
    def returned(self, ident: Ident) -> Ticket | None: ...
    def held(self, leases: Iterable[wire.RemoteLease], peer: Peer) -> None: ...
    def ended(self, leases: Iterable[wire.RemoteLease]) -> None: ...
    def forget(self, peer: Peer) -> int: ...
    def unheeded(self, since_ns: int) -> set[Peer]: ...


class _Reserved(NamedTuple):
    ticket: Ticket
    slot: int
    since_ns: int


class _Answers:
    """For one frontend, gathered during a turn."""

    def __init__(self) -> None:
        self.granted: list[wire.Grant] = []
        self.remote: list[wire.RemoteGrant] = []
        self.refused: list[wire.Refusal] = []
        self.lost: list[int] = []
        self.again = False

    def messages(self) -> Iterable[wire.Grants]:
        most = max(len(self.granted), len(self.refused), len(self.lost), len(self.remote), 1)
        for start in range(0, most, PER_MESSAGE):
            part = slice(start, start + PER_MESSAGE)
            again = self.again and not start
            yield wire.Grants(self.granted[part], self.refused[part], self.lost[part], again, self.remote[part])


class Admission:
    """Owned by the scheduler; the one writer of the table's block `queue`."""

    def __init__(
        self,
        table: TableReader,
        cells: memoryview,
        events: memoryview,
        config: Scheduler,
        outlet: Outlet,
        now_ns: int,
    ) -> None:
        """`cells` and `events`: the blocks `queue` and `events`, writable. What a predecessor left there is cleared."""
        self._table = table
        self._cells = cells
        self._events = events
        self._outlet = outlet
        self._slots = len(cells) // len(QueueColumn)
        self._saturation = Saturation(table, config.instance_capacity)
        self._queue = AdmissionQueue(
            config.queue_max_tickets,
            config.queue_max_tokens,
            int(config.queue_aging_secs * 1e9),
            1e9 / config.prefill_tokens_per_sec,
        )
        self.abroad: Abroad | None = None
        """Set with `scheduler.name: global`, before anything is heard."""
        self.on_change: Callable[[], None] = lambda: None
        """Called after each sweep that found something in line, or nothing any more."""
        self.yields: Callable[[int], bool] = lambda _: False
        """Whether a place in that slot is set aside for another host's ticket, before one of ours gets it."""
        self._waited = False
        self._addresses: dict[Peer, bytes] = {}
        self._reserved: dict[Ident, _Reserved] = {}
        self._answers: dict[Peer, _Answers] = {}
        self._shown: set[int] = set()
        for column in (QueueColumn.RESERVED, QueueColumn.TICKETS, QueueColumn.TOKENS):
            for slot in range(self._slots):
                cells[column * self._slots + slot] = 0
        # What is held stays so until the frontends have said what waits: nobody overtakes those in line meanwhile.
        self._held = {slot for slot in range(self._slots) if cells[QueueColumn.HELD * self._slots + slot]}
        self._awaited = set(table.counters.lives())
        self._awaited_until_ns = now_ns + PATIENCE_NS

    def __repr__(self) -> str:
        return f"Admission({self._queue!r}, {len(self._reserved)} reserved)"

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is reserved: then time changes nothing."""
        if self.abroad is not None and not self.abroad.is_idle:
            return False
        return not (len(self._queue) or self._reserved or self._shown or self._awaited or self._held)

    # -- frontends -----------------------------------------------------------------------------------------

    def hear(self, address: bytes, message: wire.Tickets, now_ns: int) -> None:
        """One message of a frontend, which is reached at `address`. Followed by `sweep`, before long."""
        peer = message.index, message.life
        if peer not in self._addresses:
            for other in [other for other in self._addresses if other[0] == peer[0]]:
                self._forget(other)
        self._addresses[peer] = address
        abroad = self.abroad
        for number in message.taken:
            if self._release((*peer, number)) is None and abroad is not None:
                abroad.taken((*peer, number))
        for number in message.withdrawn:
            ident = (*peer, number)
            if self._release(ident) or self._queue.withdraw(ident) or (abroad is not None and abroad.withdrawn(ident)):
                self._count(SchedulerEvent.TICKETS_WITHDRAWN)
        for number in message.returned:
            if reserved := self._release((*peer, number)):
                self._count(SchedulerEvent.TICKETS_RETURNED)
                self._cells[QueueColumn.RETURNED * self._slots + reserved.slot] += 1
                self._queue.put_back(reserved.ticket, now_ns)
            elif abroad is not None and (again := abroad.returned((*peer, number))) is not None:
                self._count(SchedulerEvent.TICKETS_RETURNED)
                self._queue.put_back(again, now_ns)
        if abroad is not None:
            abroad.held(message.held, peer)
            abroad.ended(message.ended)
        for ticket in message.offered:
            self._offer(peer, ticket, now_ns)
        if message.complete:
            self._awaited.discard(peer)

    def _offer(self, peer: Peer, ticket: wire.Ticket, now_ns: int) -> None:
        ident = (*peer, ticket.number)
        if ident in self._queue or ident in self._reserved or (self.abroad is not None and ident in self.abroad):
            return
        try:
            self._queue.offer(
                Ticket(
                    ident,
                    self._table.kind(ticket.role, ticket.model),
                    ticket.home if 0 <= ticket.home < self._slots else 0,
                    min(max(1, ticket.prompt), MOST_TOKENS),
                    min(max(0, ticket.priority), LOWEST_PRIORITY),
                    ticket.key,
                    min(ticket.offered_ns, now_ns),
                    ticket.deadline_ns,
                    dict(islice(ticket.cached.items(), wire.MOST_CACHED)),
                    ticket.model,
                    ticket.abroad,
                ),
                now_ns,
            )
        except QueueFull as full:
            self._count(SchedulerEvent.TICKETS_REFUSED)
            self._answer(peer).refused.append(wire.Refusal(ticket.number, full.retry_after_s or 1, full.message))
        else:
            self._count(SchedulerEvent.TICKETS_OFFERED)

    def _release(self, ident: Ident) -> _Reserved | None:
        """Ends a reservation; None when there is none."""
        reserved = self._reserved.pop(ident, None)
        if reserved is not None:
            self._cells[QueueColumn.RESERVED * self._slots + reserved.slot] -= 1
        return reserved

    def _forget(self, peer: Peer) -> None:
        """The frontend is dead, or not itself: nothing of it stands in line."""
        self._addresses.pop(peer, None)
        if self.abroad is not None:
            for _ in range(self.abroad.forget(peer)):
                self._count(SchedulerEvent.TICKETS_WITHDRAWN)
        for ident in [ident for ident in self._reserved if ident[:2] == peer]:
            self._release(ident)
            self._count(SchedulerEvent.TICKETS_WITHDRAWN)
        for ident in self._queue.idents(peer):
            if self._queue.withdraw(ident):
                self._count(SchedulerEvent.TICKETS_WITHDRAWN)

    # -- granting ------------------------------------------------------------------------------------------

    def sweep(self, now_ns: int) -> None:
        """Grants what there is room for, and sends what the frontends must know."""
        if now_ns >= self._awaited_until_ns:
            self._awaited.clear()
        if self._awaited:
            return
        serving = self._serving(now_ns)
        rooms = {slot: room for slot in serving if (room := self._saturation.opening(slot)) > 0}
        for slot in rooms:
            if self.yields(slot):  # one of each: room may have no end
                rooms[slot] -= 1
        # Nobody steals what its own instance has room for.
        for steal in (False, True):
            for slot in rooms:
                while rooms[slot] > 0:
                    grant = self._queue.grant(slot, serving[slot], now_ns, steal=steal)
                    if grant is None:
                        break
                    rooms[slot] -= 1
                    self._reserve(grant, now_ns)
        waiting = self._queue.pools
        self._hold({slot for slot, pools in serving.items() if any(pool in waiting for pool in pools)})
        self._send()
        if waiting or self._waited:
            self._waited = bool(waiting)
            self.on_change()

    def _serving(self, now_ns: int) -> dict[int, list[Pool]]:
        """The pools in which tickets wait, by the slots that serve them. Tickets follow who comes and goes."""
        serving: dict[int, list[Pool]] = {}
        for pool in list(self._queue.pools):
            try:
                slots: list[int] = self._table.view(*pool).slots.tolist()
            except (NoInstance, ModelNotFound):
                for ticket in self._queue.rehome(pool, (), now_ns):
                    self._count(SchedulerEvent.TICKETS_REFUSED)
                    self._answer(ticket.ident[:2]).lost.append(ticket.ident[2])
                continue
            self._queue.rehome(pool, set(slots), now_ns)
            for slot in slots:
                serving.setdefault(slot, []).append(pool)
        return serving

    def _reserve(self, grant: Grant, now_ns: int) -> None:
        ticket, slot = grant.ticket, grant.slot
        index, life, number = ticket.ident
        self._reserved[ticket.ident] = _Reserved(ticket, slot, now_ns)
        self._cells[QueueColumn.RESERVED * self._slots + slot] += 1
        self._cells[QueueColumn.GRANTED * self._slots + slot] += 1
        self._cells[QueueColumn.WAITED_US * self._slots + slot] += max(0, now_ns - ticket.offered_ns) // 1000
        self._count(SchedulerEvent.TICKETS_GRANTED)
        if grant.stolen:
            self._cells[QueueColumn.STOLEN * self._slots + slot] += 1
            self._cells[QueueColumn.ROBBED * self._slots + ticket.home] += 1
            self._count(SchedulerEvent.TICKETS_STOLEN)
        generation = int(self._table.snapshot[Column.GENERATION, slot])
        self._answer((index, life)).granted.append(wire.Grant(number, slot, generation, ticket.home))

    def _hold(self, held: set[int]) -> None:
        for slot in held ^ self._held:
            self._cells[QueueColumn.HELD * self._slots + slot] = slot in held
        self._held = held

    # -- other hosts ---------------------------------------------------------------------------------------

    @property
    def waiting(self) -> tuple[int, int]:
        """Tickets in line, and what they cost at their homes."""
        return len(self._queue), self._queue.tokens

    def front(self, limit: int) -> list[tuple[int, Ticket]]:
        """Who is next in line and may go to another host, each with what orders it."""
        return [] if self._awaited else [item for item in self._queue.front(limit) if item[1].abroad]

    def paces_ms(self, slots: Iterable[int]) -> dict[int, float]:
        """How often these instances take a ticket; those without experience are missing."""
        return {slot: pace / 1e6 for slot in slots if (pace := self._queue.pace_ns(slot)) is not None}

    def lend(self, ident: Ident) -> Ticket | None:
        """Takes a ticket out of the line, for another host's instance; None: it waits no more."""
        return self._queue.lend(ident)

    def grant_abroad(self, ticket: Ticket, lease: wire.RemoteLease, name: str, instance: bytes) -> None:
        """Its request may go to an instance of the host called `name`. Followed by a sweep, which sends it."""
        index, life, number = ticket.ident
        self._count(SchedulerEvent.TICKETS_GRANTED)
        self._count(SchedulerEvent.CLUSTER_BORROWED)
        self._answer((index, life)).remote.append(wire.RemoteGrant(number, lease, name, instance, ticket.home))

    # -- time ----------------------------------------------------------------------------------------------

    def tick(self, now_ns: int) -> None:
        """Looks after what no message tells: deadlines, frontends that died or stopped. Followed by a sweep."""
        lives = set(self._table.counters.lives())
        self._awaited &= lives
        for peer in self._addresses.keys() - lives:
            self._forget(peer)
        unheeded = [reserved for reserved in self._reserved.values() if now_ns - reserved.since_ns > HEED_NS]
        peers = {reserved.ticket.ident[:2] for reserved in unheeded}
        if self.abroad is not None:
            peers |= self.abroad.unheeded(now_ns - HEED_NS) & self._addresses.keys()
        for peer in peers:
            address = self._addresses[peer]
            self._forget(peer)
            self._outlet(address, wire.Grants(again=True))
        for _ in self._queue.expire(now_ns):
            self._count(SchedulerEvent.TICKETS_WITHDRAWN)
        self._show()

    def _show(self) -> None:
        """What waits where, for people."""
        waiting = self._queue.by_home()
        for slot in waiting.keys() | self._shown:
            tickets, tokens = waiting.get(slot, (0, 0))
            self._cells[QueueColumn.TICKETS * self._slots + slot] = tickets
            self._cells[QueueColumn.TOKENS * self._slots + slot] = tokens
        self._shown = set(waiting)

    # -- answers -------------------------------------------------------------------------------------------

    def _answer(self, peer: Peer) -> _Answers:
        answers = self._answers.get(peer)
        if answers is None:
            answers = self._answers[peer] = _Answers()
        return answers

    def _send(self) -> None:
        answers, self._answers = self._answers, {}
        for peer, answer in answers.items():
            address = self._addresses.get(peer)
            if address is not None:
                for message in answer.messages():
                    self._outlet(address, message)

    def _count(self, event: SchedulerEvent) -> None:
        self._events[event] += 1
