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
from collections.abc import Collection, Iterable
from typing import NamedTuple

from broker.errors import QueueFull
from broker.scheduler.lines import Home, Ident, Peer, Place, Pool, Sorted, Ticket, by_age, by_deadline

VICTIMS = 4
"""Homes looked at per steal, those with the most waiting tokens first."""
_PACE_WEIGHT = 0.2
"""Of the newest interval between two grants, in the mean."""


class Grant(NamedTuple):
    ticket: Ticket
    slot: int

    @property
    def stolen(self) -> bool:
        return self.slot != self.ticket.home


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
        # By frontend, then by number: numbers rise, so those that come one after the other lie side by side.
        self._places: dict[Peer, dict[int, Place]] = {}
        self._count = 0
        self._pools: dict[Pool, dict[int, Home]] = {}
        self._paces: dict[int, _Pace] = {}
        self._deadlines = Sorted(by_deadline)
        self._ages = Sorted(by_age)
        self.tokens = 0
        """What all tickets cost at home."""

    def __len__(self) -> int:
        return self._count

    def __contains__(self, ident: Ident) -> bool:
        return self._place(ident) is not None

    def __repr__(self) -> str:
        homes = {(pool, slot): home.count for pool, homes in self._pools.items() for slot, home in homes.items()}
        return f"AdmissionQueue({len(self)} tickets, {self.tokens} tokens, {homes})"

    @property
    def pools(self) -> Collection[Pool]:
        """Those in which tickets wait."""
        return self._pools.keys()

    def idents(self, peer: Peer) -> list[Ident]:
        """Of the tickets of one frontend."""
        return [place.ticket.ident for place in self._places.get(peer, {}).values()]

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
        return [(place.age_ns, place.ticket) for place in self._ages.first(limit)]

    def pace_ns(self, slot: int) -> float | None:
        """Mean time between two tickets that the instance takes; None without experience."""
        pace = self._paces.get(slot)
        return None if pace is None else pace.mean_ns

    # -- coming and going ----------------------------------------------------------------------------------

    def offer(self, ticket: Ticket, now_ns: int) -> None:
        """A request begins to wait; said again, nothing happens. Raises QueueFull, with the time to come again."""
        if ticket.ident in self:
            return
        tokens = self.tokens + ticket.cost_at(ticket.home)
        if self._count and (self._count >= self._max_tickets or tokens > self._max_tokens):
            raise QueueFull(
                f"{self._count} requests with {self.tokens} uncached prompt tokens are waiting already",
                retry_after_s=self._retry_after_s(now_ns),
            )
        self._enter(ticket, now_ns)

    def put_back(self, ticket: Ticket, now_ns: int) -> None:
        """A granted ticket that could not be taken: to its old place, next in turn if it was; bounds do not count."""
        if ticket.ident in self:
            return
        place = self._enter(ticket, now_ns)
        place.line.credit += place.cost
        place.line.lane.lines.move_to_end(place.line.key, last=False)

    def withdraw(self, ident: Ident) -> Ticket | None:
        """Its client left, or its frontend; None: it does not wait here."""
        place = self._place(ident)
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
        own = [place for each in homes if slot in each for place in each[slot].turns()[:1]]
        if own:
            return self._take(min(own, key=by_age) if len(own) > 1 else own[0], slot, now_ns)
        if not steal:
            return None
        peers = [home for each in homes for home in each.values()]
        for victim in _most_loaded(peers):
            place = self._to_steal(victim, slot, now_ns)
            if place is not None:
                return self._take(place, slot, now_ns)
        return None

    def _to_steal(self, victim: Home, thief: int, now_ns: int) -> Place | None:
        pace = self._paces.get(victim.slot)
        wait_ns = pace.expected_ns(now_ns) if pace is not None else float("inf")
        for head in victim.turns():
            if not head.lost_at(thief) and head.cost_at(thief) * self._token_ns <= wait_ns:
                return head  # nothing is cheaper to move, and it is the oldest
            near = head.line.places.near_head()
            found = [place for place in near if place.cost_at(thief) * self._token_ns <= wait_ns]
            if found:
                return min(found, key=lambda place: (place.lost_at(thief), place.age_ns))
        return None

    def _take(self, place: Place, slot: int, now_ns: int) -> Grant:
        place.line.credit -= place.cost
        self._leave(place)
        if slot == place.line.home.slot:
            self._paces[slot].took(now_ns)
        return Grant(place.ticket, slot)

    def lend(self, ident: Ident) -> Ticket | None:
        """For an instance of another host: the ticket waits no more, and its line is charged. None: it is not here."""
        place = self._place(ident)
        if place is None:
            return None
        place.line.credit -= place.cost
        self._leave(place)
        return place.ticket

    def _place(self, ident: Ident) -> Place | None:
        siblings = self._places.get(ident[:2])
        return None if siblings is None else siblings.get(ident[2])

    # -- one place each ------------------------------------------------------------------------------------

    def _enter(self, ticket: Ticket, now_ns: int) -> Place:
        homes = self._pools.setdefault(ticket.pool, {})
        home = homes.get(ticket.home)
        if home is None:
            home = homes[ticket.home] = Home(ticket.home)
            pace = self._paces.get(ticket.home)
            if pace is None:
                self._paces[ticket.home] = _Pace(now_ns)
            else:
                pace.since_ns = now_ns
        age_ns = ticket.offered_ns + ticket.priority * self._aging_ns
        siblings = self._places.setdefault(ticket.ident[:2], {})
        place = siblings[ticket.ident[2]] = home.enter(ticket, siblings, age_ns)
        self._count += 1
        self._deadlines.push(place)
        self._ages.push(place)
        self.tokens += place.cost
        return place

    def _leave(self, place: Place) -> None:
        home = place.line.home
        del place.siblings[place.number]
        if not place.siblings:
            del self._places[place.ticket.ident[:2]]
        self._count -= 1
        home.leave(place)
        self._deadlines.left()
        self._ages.left()
        self.tokens -= place.cost
        if not home.count:
            pool = place.ticket.pool
            homes = self._pools[pool]
            del homes[home.slot]
            if not homes:
                del self._pools[pool]

    def _retry_after_s(self, now_ns: int) -> int:
        """About when the last of those that wait now will have been served."""
        rate = sum(1 / wait for pace in self._paces.values() if 0 < (wait := pace.expected_ns(now_ns)) < 1e15)
        return max(1, min(60, round(self._count / rate / 1e9))) if rate else 1


def _offered(place: Place) -> int:
    return place.ticket.offered_ns


def _tokens(home: Home) -> int:
    return home.tokens


def _most_loaded(homes: list[Home]) -> list[Home]:
    return heapq.nlargest(VICTIMS, homes, key=_tokens) if len(homes) > 1 else homes
