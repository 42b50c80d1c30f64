"""One instance's tickets in line, and who of them is next. Pure; `broker.scheduler.queue` has all instances.

    Home          of one instance: where the frontend's policy would have sent them
      Lane        of one priority; the lanes of a home compete by age
        Line      of one fairness key; the lines of a lane take turns, weighted by tokens
          [place, place, ...]         by the time at which the request began to wait

What a grant looks at is in the places themselves, not in their tickets: with 50,000 waiting everything that is touched
comes from far away, and a grant costs what it touches (benchmarks/test_queue.py).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from operator import attrgetter
from typing import NamedTuple

from broker.types import Role

Pool = tuple[Role, str | None]
"""What tickets have in common that the same instances can serve: `TableReader.kind`."""
Peer = tuple[int, int]
"""A frontend: row and life."""
Ident = tuple[int, int, int]
"""Row and life of the ticket's frontend, and its number there."""

LOOK = 16
"""Tickets looked at per line when stealing: the head and the next few."""
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
    abroad: bool = True
    """An instance of another host will do."""

    def cost_at(self, slot: int) -> int:
        """Tokens that the instance in `slot` would have to compute, at least 1."""
        return min(max(1, self.prompt - self.cached[slot]), self.prompt) if slot in self.cached else self.prompt


class Place:
    """A ticket in a line, or what is left of it there after it was withdrawn or granted."""

    __slots__ = ("age_ns", "cost", "has_cached", "line", "number", "siblings", "ticket", "waits")

    def __init__(self, ticket: Ticket, line: Line, siblings: dict[int, Place], age_ns: int) -> None:
        self.ticket = ticket
        self.number = ticket.ident[2]
        self.siblings = siblings
        """All of the same frontend, by their numbers."""
        self.cost = ticket.cost_at(line.home.slot)
        self.has_cached = bool(ticket.cached)
        self.age_ns = age_ns
        """When it began to wait, and later for each step of its priority below the highest."""
        self.line = line
        self.waits = True

    def cost_at(self, slot: int) -> int:
        """Tokens that the instance in `slot` would have to compute."""
        return self.ticket.cost_at(slot) if self.has_cached else self.cost

    def lost_at(self, slot: int) -> int:
        """Tokens that are cached at home and would have to be computed in `slot`."""
        return max(0, self.ticket.cost_at(slot) - self.cost) if self.has_cached else 0


by_age: Callable[[Place], int] = attrgetter("age_ns")
by_deadline: Callable[[Place], int] = attrgetter("ticket.deadline_ns")


class Sorted:
    """Places by a time. Those that no longer wait are dropped when they surface, or when they are the most.

    Nearly all come in the order of their times: those are appended, and a grant costs the same however many there are.
    The others (put back, offered again, a little late) are few, and kept in a heap.
    """

    __slots__ = ("_gone", "_late", "_newest", "_punctual", "_serial", "_time")

    def __init__(self, time: Callable[[Place], int]) -> None:
        self._time = time
        self._punctual: deque[Place] = deque()
        self._newest = 0  # of the punctual ones, or newer
        self._late: list[tuple[int, int, Place]] = []
        self._serial = 0  # equal times: in the order of coming, and places are never compared
        self._gone = 0

    def __len__(self) -> int:
        """Those that are gone included."""
        return len(self._punctual) + len(self._late)

    def push(self, place: Place) -> None:
        at = self._time(place)
        if not self._punctual or at >= self._newest:
            self._punctual.append(place)
            self._newest = at
        else:
            self._serial += 1
            heapq.heappush(self._late, (at, self._serial, place))

    def head(self) -> Place | None:
        punctual, late = self._punctual, self._late
        while punctual and not punctual[0].waits:
            punctual.popleft()
            self._gone -= 1
        while late and not late[0][2].waits:
            heapq.heappop(late)
            self._gone -= 1
        if late and (not punctual or late[0][0] < self._time(punctual[0])):
            return late[0][2]
        return punctual[0] if punctual else None

    def near_head(self) -> list[Place]:
        """Some of the oldest, the head among them."""
        places = [*islice(self._punctual, LOOK), *(item[2] for item in self._late[:LOOK])]
        return [place for place in places if place.waits]

    def waiting(self) -> Iterator[Place]:
        places = chain(self._punctual, (item[2] for item in self._late))
        return (place for place in places if place.waits)

    def first(self, limit: int) -> list[Place]:
        """The oldest that wait, in order."""
        self.head()
        punctual = [place for place in islice(self._punctual, limit * LOOK) if place.waits][:limit]
        late = [place for _, _, place in heapq.nsmallest(limit, self._late) if place.waits]
        return sorted(punctual + late, key=self._time)[:limit] if late else punctual

    def left(self) -> None:
        """One of the places here waits no more."""
        self._gone += 1
        if self._gone > _FEW and self._gone * 2 > len(self):
            self._punctual = deque(place for place in self._punctual if place.waits)
            self._late = [item for item in self._late if item[2].waits]
            heapq.heapify(self._late)
            self._gone = 0


class Line:
    """The tickets of one fairness key."""

    __slots__ = ("count", "credit", "home", "key", "lane", "places")

    def __init__(self, key: str, lane: Lane, home: Home) -> None:
        self.key = key
        self.lane = lane
        self.home = home
        self.places = Sorted(by_age)
        self.count = 0
        self.credit = 0

    def head(self) -> Place:
        place = self.places.head()
        assert place is not None, "a line without tickets is removed from its lane"
        return place


class Lane:
    """The lines of one priority, in the order of their turns; the first one has its turn now."""

    __slots__ = ("lines", "quantum")

    def __init__(self) -> None:
        self.lines: OrderedDict[str, Line] = OrderedDict()
        self.quantum = 1

    def turn(self) -> Place:
        """Who is next. Stays so until it is granted or withdrawn."""
        line = next(iter(self.lines.values()))
        place = line.head()
        if line.credit < place.cost:
            self.lines.move_to_end(line.key)
            line = next(iter(self.lines.values()))
            place = line.head()
            if line.credit < place.cost:
                line.credit += self.quantum
        return place


class Home:
    """The tickets that prefer one instance, of one pool."""

    __slots__ = ("count", "lanes", "slot", "tokens")

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.lanes: dict[int, Lane] = {}
        self.count = 0
        self.tokens = 0

    def enter(self, ticket: Ticket, siblings: dict[int, Place], age_ns: int) -> Place:
        lane = self.lanes.get(ticket.priority)
        if lane is None:
            lane = self.lanes[ticket.priority] = Lane()
        line = lane.lines.get(ticket.key)
        if line is None:
            line = lane.lines[ticket.key] = Line(ticket.key, lane, self)
        place = Place(ticket, line, siblings, age_ns)
        lane.quantum = max(lane.quantum, place.cost)
        line.places.push(place)
        line.count += 1
        self.count += 1
        self.tokens += place.cost
        return place

    def leave(self, place: Place) -> None:
        line = place.line
        place.waits = False
        line.places.left()
        line.count -= 1
        self.count -= 1
        self.tokens -= place.cost
        if not line.count:
            del line.lane.lines[line.key]
            if not line.lane.lines:
                del self.lanes[place.ticket.priority]

    def turns(self) -> list[Place]:
        """Who is next in each lane, the oldest first."""
        heads = [lane.turn() for lane in self.lanes.values()]
        return sorted(heads, key=by_age) if len(heads) > 1 else heads

    def places(self) -> list[Place]:
        lines = (line for lane in self.lanes.values() for line in lane.lines.values())
        return [place for line in lines for place in line.places.waiting()]
