"""Requests that wait for room: who is next, and whose queue an idle instance may help itself from. Pure: no clock, no
sockets, no prompts. A *ticket* stands for a request whose body stays at its frontend.

    AdmissionQueue
      pool            tickets that the same instances can serve (role and model)
        Home          of one instance: where the frontend's policy would have sent them
          Lane        of one priority; the lanes of a home compete by age
            Line      of one fairness key; the lines of a lane take turns, weighted by tokens
              [ticket, ticket, ...]       by the time at which the request began to wait

**FIFO.** A line is sorted by `offered_ns`, not by arrival here. A ticket that is put back (its instance changed before
it could be taken) or offered again (to the next scheduler) stands where it stood, whatever happened in between.

**Priorities.** The head of a lane counts as younger by `aging_ns` for each step below the highest priority, and the
oldest head is served. So a low ticket can be passed only by those that came less than that time after it.

**Cost** is what an instance has to compute: the tokens of the prompt that it has not cached. In line a ticket counts
by its cost at home, which is what it takes away from the others there.

**Fairness** is a deficit round robin. In its turn a line is credited the quantum, and serves while its credit pays for
its head. The quantum is the greatest cost that has waited in the lane since it was last empty: then a turn serves at
least one ticket, and a grant takes the same time whatever waits. Two lines that both wait all the time differ by at
most three quanta in tokens served.

**Stealing.** An instance with room takes its own tickets first, else from the home with the most waiting tokens:
never a ticket that costs it more time than the ticket can expect to wait where it is, and among those next in line the
one that loses least: whose prompt is cached least at home, as far as the thief has not cached it as well. It is charged
to the line it is taken from.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import NamedTuple

from broker.errors import QueueFull
from broker.types import Role

Pool = tuple[Role, str | None]
"""What tickets have in common that the same instances can serve: `TableReader.kind`."""
Ident = tuple[int, int, int]
"""Row and life of the ticket's frontend, and its number there."""

VICTIMS = 4
"""Homes looked at per steal, those with the most waiting tokens first."""
LOOK = 16
"""Tickets looked at per line when stealing: the head and the next few."""
_PACE_WEIGHT = 0.2
"""Of the newest interval between two grants, in the mean."""
_FEW = 64
"""Places that are gone may lie about before it is worth tidying up."""


class Ticket(NamedTuple):
    """One waiting request."""

    ident: Ident
    pool: Pool
    home: int
    """The slot that the policy preferred."""
    prompt: int
    """Tokens, at least 1."""
    priority: int
    """0 is the highest."""
    key: str
    """Fairness key: whose request it is."""
    offered_ns: int
    """When it began to wait; its place in line."""
    deadline_ns: int
    cached: Mapping[int, int] = {}
    """Tokens of the prompt that instances have cached, by slot; where nothing is known, nothing is."""
    model: str | None = None
    """As its client named it; the pool knows only names that this host serves."""

    def cost_at(self, slot: int) -> int:
        """Tokens that the instance in `slot` would have to compute, at least 1."""
        return min(max(1, self.prompt - self.cached[slot]), self.prompt) if slot in self.cached else self.prompt


class Grant(NamedTuple):
    ticket: Ticket
    slot: int

    @property
    def stolen(self) -> bool:
        return self.slot != self.ticket.home


class _Place:
    """A ticket in a line, or what is left of it there after it was withdrawn or granted."""

    __slots__ = ("cost", "home", "lane", "line", "ticket", "waits")

    def __init__(self, ticket: Ticket, home: Home, lane: Lane, line: Line) -> None:
        self.ticket = ticket
        self.cost = ticket.cost_at(home.slot)
        self.home = home
        self.lane = lane
        self.line = line
        self.waits = True

    def lost_at(self, slot: int) -> int:
        """Tokens that are cached at home and would have to be computed in `slot`."""
        return max(0, self.ticket.cost_at(slot) - self.cost)


class _Sorted:
    """Places by a time. Those that no longer wait are dropped when they surface, or when they are the most.

    Nearly all come in the order of their times: those are appended, and a grant costs the same however many there are.
    The others (put back, offered again, a little late) are few, and kept in a heap.
    """

    __slots__ = ("_gone", "_late", "_punctual", "_serial")

    def __init__(self) -> None:
        self._punctual: deque[tuple[int, _Place]] = deque()
        self._late: list[tuple[int, int, _Place]] = []
        self._serial = 0  # equal times: in the order of coming, and places are never compared
        self._gone = 0

    def __len__(self) -> int:
        """Those that are gone included."""
        return len(self._punctual) + len(self._late)

    def push(self, at: int, place: _Place) -> None:
        if not self._punctual or at >= self._punctual[-1][0]:
            self._punctual.append((at, place))
        else:
            self._serial += 1
            heapq.heappush(self._late, (at, self._serial, place))

    def head(self) -> _Place | None:
        punctual, late = self._punctual, self._late
        while punctual and not punctual[0][1].waits:
            punctual.popleft()
            self._gone -= 1
        while late and not late[0][2].waits:
            heapq.heappop(late)
            self._gone -= 1
        if late and (not punctual or late[0][0] < punctual[0][0]):
            return late[0][2]
        return punctual[0][1] if punctual else None

    def near_head(self) -> list[_Place]:
        """Some of the oldest, the head among them."""
        places = [item[1] for item in islice(self._punctual, LOOK)] + [item[2] for item in self._late[:LOOK]]
        return [place for place in places if place.waits]

    def waiting(self) -> Iterator[_Place]:
        places = chain((item[1] for item in self._punctual), (item[2] for item in self._late))
        return (place for place in places if place.waits)

    def first(self, limit: int) -> list[tuple[int, _Place]]:
        """The oldest that wait, with their times, in order."""
        self.head()
        punctual = [item for item in islice(self._punctual, limit * LOOK) if item[1].waits][:limit]
        late = [(at, place) for at, _, place in heapq.nsmallest(limit, self._late) if place.waits]
        return sorted(punctual + late, key=_time)[:limit] if late else punctual

    def left(self) -> None:
        """One of the places here waits no more."""
        self._gone += 1
        if self._gone > _FEW and self._gone * 2 > len(self):
            self._punctual = deque(item for item in self._punctual if item[1].waits)
            self._late = [item for item in self._late if item[2].waits]
            heapq.heapify(self._late)
            self._gone = 0


class Line:
    """The tickets of one fairness key."""

    __slots__ = ("count", "credit", "key", "places")

    def __init__(self, key: str) -> None:
        self.key = key
        self.places = _Sorted()
        self.count = 0
        self.credit = 0

    def head(self) -> _Place:
        place = self.places.head()
        assert place is not None, "a line without tickets is removed from its lane"
        return place


class Lane:
    """The lines of one priority, in the order of their turns; the first one has its turn now."""

    __slots__ = ("lines", "quantum")

    def __init__(self) -> None:
        self.lines: OrderedDict[str, Line] = OrderedDict()
        self.quantum = 1

    def turn(self) -> Line:
        """Whose head is next. Stays so until it is served or withdrawn."""
        line = next(iter(self.lines.values()))
        if line.credit < line.head().cost:
            self.lines.move_to_end(line.key)
            line = next(iter(self.lines.values()))
            if line.credit < line.head().cost:
                line.credit += self.quantum
        return line


class Home:
    """The tickets that prefer one instance, of one pool."""

    __slots__ = ("count", "lanes", "slot", "tokens")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.lanes: dict[int, Lane] = {}
        self.count = 0
        self.tokens = 0

    def enter(self, ticket: Ticket) -> _Place:
        lane = self.lanes.get(ticket.priority)
        if lane is None:
            lane = self.lanes[ticket.priority] = Lane()
        line = lane.lines.get(ticket.key)
        if line is None:
            line = lane.lines[ticket.key] = Line(ticket.key)
        place = _Place(ticket, self, lane, line)
        lane.quantum = max(lane.quantum, place.cost)
        line.places.push(ticket.offered_ns, place)
        line.count += 1
        self.count += 1
        self.tokens += place.cost
        return place

    def leave(self, place: _Place) -> None:
        line = place.line
        place.waits = False
        line.places.left()
        line.count -= 1
        self.count -= 1
        self.tokens -= place.cost
        if not line.count:
            del place.lane.lines[line.key]
            if not place.lane.lines:
                del self.lanes[place.ticket.priority]

    def lanes_by_age(self, aging_ns: int) -> list[tuple[int, Line]]:
        """What each lane would serve next, the one that is served first."""
        turns = [(priority, lane.turn()) for priority, lane in self.lanes.items()]
        aged = [(line.head().ticket.offered_ns + priority * aging_ns, line) for priority, line in turns]
        return sorted(aged, key=_age) if len(aged) > 1 else aged

    def places(self) -> list[_Place]:
        lines = (line for lane in self.lanes.values() for line in lane.lines.values())
        return [place for line in lines for place in line.places.waiting()]


class _Pace:
    """How often an instance takes a ticket while others wait for it."""

    __slots__ = ("mean_ns", "since_ns")

    def __init__(self, now_ns: int) -> None:
        self.mean_ns: float | None = None
        self.since_ns = now_ns  # the last grant, or when tickets began to wait

    def took(self, now_ns: int) -> None:
        interval = now_ns - self.since_ns
        self.mean_ns = interval if self.mean_ns is None else self.mean_ns + _PACE_WEIGHT * (interval - self.mean_ns)
        self.since_ns = now_ns

    def expected_ns(self, now_ns: int) -> float:
        """Until the next one; without experience, without end: any instance that is idle is better than that."""
        return float("inf") if self.mean_ns is None else max(self.mean_ns, now_ns - self.since_ns)


class AdmissionQueue:
    """Every waiting ticket of one host. The scheduler is its one owner; all times are its monotonic clock."""

    def __init__(self, max_tickets: int, max_tokens: int, aging_ns: int, token_ns: float) -> None:
        """`token_ns`: how long an engine reads one uncached token of a prompt, for weighing it against a wait."""
        self._max_tickets = max_tickets
        self._max_tokens = max_tokens
        self._aging_ns = aging_ns
        self._token_ns = token_ns
        self._places: dict[Ident, _Place] = {}
        self._pools: dict[Pool, dict[int, Home]] = {}
        self._paces: dict[int, _Pace] = {}
        self._deadlines = _Sorted()
        self._ages = _Sorted()
        self.tokens = 0
        """What all tickets cost at home."""

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, ident: Ident) -> bool:
        return ident in self._places

    def __repr__(self) -> str:
        homes = {(pool, slot): home.count for pool, homes in self._pools.items() for slot, home in homes.items()}
        return f"AdmissionQueue({len(self)} tickets, {self.tokens} tokens, {homes})"

    @property
    def pools(self) -> Collection[Pool]:
        """Those in which tickets wait."""
        return self._pools.keys()

    @property
    def idents(self) -> list[Ident]:
        return list(self._places)

    def by_home(self) -> dict[int, tuple[int, int]]:
        """Tickets and tokens that wait, by the slot they prefer."""
        found: dict[int, tuple[int, int]] = {}
        for homes in self._pools.values():
            for slot, home in homes.items():
                tickets, tokens = found.get(slot, (0, 0))
                found[slot] = tickets + home.count, tokens + home.tokens
        return found

    def front(self, limit: int) -> list[tuple[int, Ticket]]:
        """Who is next, whatever its home, by age and priority; fairness keys have their turns within a host only.

        With each ticket goes what orders it among all of them.
        """
        return [(at, place.ticket) for at, place in self._ages.first(limit)]

    def pace_ns(self, slot: int) -> float | None:
        """Mean time between two tickets that the instance takes; None without experience."""
        pace = self._paces.get(slot)
        return None if pace is None else pace.mean_ns

    # -- coming and going ----------------------------------------------------------------------------------

    def offer(self, ticket: Ticket, now_ns: int) -> None:
        """A request begins to wait; said again, nothing happens. Raises QueueFull, with the time to come again."""
        if ticket.ident in self._places:
            return
        tokens = self.tokens + ticket.cost_at(ticket.home)
        if self._places and (len(self._places) >= self._max_tickets or tokens > self._max_tokens):
            raise QueueFull(
                f"{len(self._places)} requests with {self.tokens} uncached prompt tokens are waiting already",
                retry_after_s=self._retry_after_s(now_ns),
            )
        self._enter(ticket, now_ns)

    def put_back(self, ticket: Ticket, now_ns: int) -> None:
        """A granted ticket that could not be taken: to its old place, next in turn if it was; bounds do not count."""
        if ticket.ident in self._places:
            return
        place = self._enter(ticket, now_ns)
        place.line.credit += place.cost
        place.lane.lines.move_to_end(place.line.key, last=False)

    def withdraw(self, ident: Ident) -> Ticket | None:
        """Its client left, or its frontend; None: it does not wait here."""
        place = self._places.get(ident)
        if place is None:
            return None
        self._leave(place)
        return place.ticket

    def expire(self, now_ns: int) -> list[Ticket]:
        """Removes those whose deadline has passed."""
        expired = []
        while (place := self._deadlines.head()) is not None and place.ticket.deadline_ns <= now_ns:
            self._leave(place)
            expired.append(place.ticket)
        return expired

    def rehome(self, pool: Pool, slots: Collection[int], now_ns: int) -> list[Ticket]:
        """Only `slots` serve the pool: tickets of other homes go to the one with the fewest waiting tokens.

        Returns the tickets that are removed, all of the pool's, because nobody serves it any more.
        """
        homes = self._pools.get(pool, {})
        if not slots:
            lost = [place.ticket for home in list(homes.values()) for place in home.places()]
            for ticket in lost:
                self.withdraw(ticket.ident)
            return lost
        for slot in [slot for slot in homes if slot not in slots]:
            for place in sorted(homes[slot].places(), key=_offered):
                self._leave(place)
                least = min(slots, key=lambda s: homes[s].tokens if s in homes else 0)
                self._enter(place.ticket._replace(home=least), now_ns)
        return []

    # -- granting ------------------------------------------------------------------------------------------

    def grant(self, slot: int, pools: Iterable[Pool], now_ns: int, *, steal: bool = True) -> Grant | None:
        """The ticket that the instance in `slot`, which serves `pools`, should run now; it waits no more.

        Without `steal` only one that prefers the instance.
        """
        homes = [homes for pool in pools if (homes := self._pools.get(pool))]
        own = [aged for each in homes if slot in each for aged in each[slot].lanes_by_age(self._aging_ns)[:1]]
        if own:
            line = min(own, key=_age)[1] if len(own) > 1 else own[0][1]
            return self._take(line.head(), slot, now_ns)
        if not steal:
            return None
        peers = [home for each in homes for home in each.values()]
        for victim in _most_loaded(peers):
            place = self._to_steal(victim, slot, now_ns)
            if place is not None:
                return self._take(place, slot, now_ns)
        return None

    def _to_steal(self, victim: Home, thief: int, now_ns: int) -> _Place | None:
        pace = self._paces.get(victim.slot)
        wait_ns = pace.expected_ns(now_ns) if pace is not None else float("inf")
        for _, line in victim.lanes_by_age(self._aging_ns):
            head = line.head()
            if not head.lost_at(thief) and head.ticket.cost_at(thief) * self._token_ns <= wait_ns:
                return head  # nothing is cheaper to move, and it is the oldest
            found = [
                place for place in line.places.near_head() if place.ticket.cost_at(thief) * self._token_ns <= wait_ns
            ]
            if found:
                return min(found, key=lambda place: (place.lost_at(thief), _offered(place)))
        return None

    def _take(self, place: _Place, slot: int, now_ns: int) -> Grant:
        place.line.credit -= place.cost
        self._leave(place)
        if slot == place.ticket.home:
            self._paces[slot].took(now_ns)
        return Grant(place.ticket, slot)

    def lend(self, ident: Ident) -> Ticket | None:
        """For an instance of another host: the ticket waits no more, and its line is charged. None: it is not here."""
        place = self._places.get(ident)
        if place is None:
            return None
        place.line.credit -= place.cost
        self._leave(place)
        return place.ticket

    # -- one place each ------------------------------------------------------------------------------------

    def _enter(self, ticket: Ticket, now_ns: int) -> _Place:
        homes = self._pools.setdefault(ticket.pool, {})
        home = homes.get(ticket.home)
        if home is None:
            home = homes[ticket.home] = Home(ticket.home)
            pace = self._paces.get(ticket.home)
            if pace is None:
                self._paces[ticket.home] = _Pace(now_ns)
            else:
                pace.since_ns = now_ns
        place = self._places[ticket.ident] = home.enter(ticket)
        self._deadlines.push(ticket.deadline_ns, place)
        self._ages.push(ticket.offered_ns + ticket.priority * self._aging_ns, place)
        self.tokens += place.cost
        return place

    def _leave(self, place: _Place) -> None:
        ticket, home = place.ticket, place.home
        del self._places[ticket.ident]
        home.leave(place)
        self._deadlines.left()
        self._ages.left()
        self.tokens -= place.cost
        if not home.count:
            homes = self._pools[ticket.pool]
            del homes[home.slot]
            if not homes:
                del self._pools[ticket.pool]

    def _retry_after_s(self, now_ns: int) -> int:
        """About when the last of those that wait now will have been served."""
        rate = sum(1 / wait for pace in self._paces.values() if 0 < (wait := pace.expected_ns(now_ns)) < 1e15)
        return max(1, min(60, round(len(self._places) / rate / 1e9))) if rate else 1


def _age(aged: tuple[int, Line]) -> int:
    return aged[0]


def _time(item: tuple[int, _Place]) -> int:
    return item[0]


def _offered(place: _Place) -> int:
    return place.ticket.offered_ns


def _tokens(home: Home) -> int:
    return home.tokens


def _most_loaded(homes: list[Home]) -> list[Home]:
    return heapq.nlargest(VICTIMS, homes, key=_tokens) if len(homes) > 1 else homes
