"""Several hosts with `--scheduler-name global`: the rule and the lines as shipped, Redis and its delays modelled.

    a line changes --(10 ms at most)--> published --bell--> survey, plan -> offer -> collect, pick -> accept -> runs

Each arrow after the bell is one round trip. All other times are those of the product.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from random import Random

from benchmarks.skew.host import POOL, TOKEN_NS, Host
from benchmarks.skew.workload import Request
from broker.cluster import borrowing
from broker.cluster.origin import PUBLISH_S
from broker.cluster.records import WINDOW, HostLoad, Place, TicketRecord
from broker.cluster.stealing import is_elder, pick, plan
from broker.cluster.thief import LOOK_S, MOST_OFFERS, RECENT_S, REFUSED_S, WATCH_S

ROUND_TRIP_S = 0.001
"""To Redis and back, between processes that are busy."""
MACHINE = "one"
TOKEN_MS = TOKEN_NS / 1e6


@dataclass
class Counts:
    offered: int = 0
    declined: int = 0
    """Nobody needed the place any more, or another thief had been first."""


@dataclass(frozen=True)
class Published:
    tickets: int
    tokens: int
    at: float
    line: tuple[TicketRecord, ...]


@dataclass
class Redis:
    published: dict[str, Published] = field(default_factory=dict)
    claims: set[tuple[str, str]] = field(default_factory=set)
    """By host and ident: an offer is on its way."""
    members: dict[str, Member] = field(default_factory=dict)


class Member:
    """A host's part in the cluster: as origin it publishes and answers offers, as thief it makes them."""

    def __init__(self, host: Host, name: str, redis: Redis, min_load_score: int, counts: Counts, seed: str) -> None:
        self._name = name
        self._host = host
        self._world = host.world
        self._redis = redis
        self._min = min_load_score
        self._counts = counts
        self._rng = Random(seed)
        self._published_at = -1.0
        self._publishes = False
        self._looks_at = -1.0
        self._surveying = False
        self._seen: tuple[float, list[HostLoad]] = -WATCH_S, []
        self._aside: set[int] = set()
        """Slots with a place set aside for an elder, until it is offered."""
        self._refused_at = -REFUSED_S
        redis.members[name] = self
        host.on_change = self._changed
        host.yields = self._yields

    # -- origin --------------------------------------------------------------------------------------------

    def _line(self) -> tuple[TicketRecord, ...]:
        queue = self._host.queue
        paces = {s: pace / 1e6 for s in range(len(self._host.instances)) if (pace := queue.pace_ns(s)) is not None}
        return tuple(borrowing.line(queue.front(WINDOW), paces, self._world.now_ns))

    def _changed(self) -> None:
        if not self._publishes:
            self._publishes = True
            self._world.at(max(self._world.now, self._published_at + PUBLISH_S), self._publish)
        self._look_soon()

    def _publish(self) -> None:
        self._publishes = False
        self._published_at = now = self._world.now
        said = Published(len(self._host.queue), self._host.queue.tokens, now, self._line())
        self._world.after(ROUND_TRIP_S, lambda: self._show(said))

    def _show(self, said: Published) -> None:
        self._redis.published[self._name] = said
        if said.tickets >= self._min:
            for name, member in self._redis.members.items():
                if name != self._name:
                    member.look()

    def collect(self, thief: Member, slot: int, named: TicketRecord) -> None:
        """An offer has arrived."""
        self._redis.claims.discard((self._name, named.ident))
        chosen = pick(*POOL[:1], (), self._line(), TOKEN_MS)
        if chosen is None:
            self._world.after(ROUND_TRIP_S, lambda: thief.refused(slot))
            return
        ticket = next(t for _, t in self._host.queue.front(WINDOW) if borrowing.name(t.ident) == chosen.ident)
        request = self._host.lend(ticket)
        self._changed()
        self._world.after(ROUND_TRIP_S, lambda: thief.take(request, slot))

    # -- thief ---------------------------------------------------------------------------------------------

    def _look_soon(self) -> None:
        """A place may have become free: the next look at shared memory will see it."""
        known = any(said.tickets >= self._min for name, said in self._redis.published.items() if name != self._name)
        if known and self._looks_at <= self._world.now:
            self._looks_at = (int(self._world.now / LOOK_S) + 1) * LOOK_S
            self._world.at(self._looks_at, self.look)

    def look(self) -> None:
        if not self._surveying and (self._places() or self._world.now - self._seen[0] >= WATCH_S):
            self._surveying = True
            self._world.after(ROUND_TRIP_S, self._survey)

    def _places(self) -> list[Place]:
        """What is set aside, and what nobody here needs."""
        slots = range(len(self._host.instances))
        if self._aside:
            return [Place(slot, POOL[0], (), 1, MACHINE, self._own_waited_ms()) for slot in self._aside]
        if len(self._host.queue):
            return []
        return [Place(slot, POOL[0], (), room, MACHINE) for slot in slots if (room := self._host.room(slot)) > 0]

    def _own_waited_ms(self) -> int | None:
        front = self._host.queue.front(1)
        return (self._world.now_ns - front[0][1].offered_ns) // 1_000_000 if front else None

    def _survey(self) -> None:
        self._surveying = False
        hosts = [
            HostLoad(name, name, MACHINE, said.tickets, said.tokens, self._as_of_now(name, said))
            for name, said in self._redis.published.items()
            if name != self._name and said.tickets
        ]
        self._seen = self._world.now, hosts
        thefts = plan(
            self._places(), hosts, min_load_score=self._min, token_ms=TOKEN_MS, most=MOST_OFFERS, rng=self._rng
        )
        for theft in thefts:
            if theft.slot in self._aside:
                self._aside.remove(theft.slot)
            else:
                self._host.reserved[theft.slot] += 1
            self._counts.offered += 1
            self._world.after(ROUND_TRIP_S, partial(self._offer, theft.slot, theft.victim.host, theft.ticket))
        for slot in list(self._aside):
            self._aside.remove(slot)
            self.refused(slot)

    def _as_of_now(self, name: str, said: Published) -> tuple[TicketRecord, ...]:
        older_ms = round((self._world.now - said.at) * 1e3)
        claims = self._redis.claims
        return tuple(t._replace(waited_ms=t.waited_ms + older_ms, claimed=(name, t.ident) in claims) for t in said.line)

    def _yields(self, slot: int) -> None:
        """The last survey, as old as it is, shows one who waits much longer than ours: the place is set aside."""
        seen_at, hosts = self._seen
        now, own = self._world.now, self._own_waited_ms()
        if own is None or now - seen_at > RECENT_S or now - self._refused_at < REFUSED_S:
            return
        older_ms = round((now - seen_at) * 1e3)
        heads = [host.line[0].waited_ms + older_ms for host in hosts if host.line and host.tickets >= self._min]
        if heads and is_elder(max(heads), own):
            self._host.reserved[slot] += 1
            self._aside.add(slot)
            self.look()

    def _offer(self, slot: int, victim: str, ticket: TicketRecord) -> None:
        if (victim, ticket.ident) in self._redis.claims:
            self.refused(slot)
            self.look()
            return
        self._redis.claims.add((victim, ticket.ident))
        origin = self._redis.members[victim]
        self._world.after(ROUND_TRIP_S, lambda: origin.collect(self, slot, ticket))

    def refused(self, slot: int) -> None:
        self._counts.declined += 1
        self._refused_at = self._world.now
        self._host.reserved[slot] -= 1
        self._host.sweep()

    def take(self, request: Request, slot: int) -> None:
        request.stolen = True
        self._host.reserved[slot] -= 1
        self._host.run(request, slot)
