"""Whom a host with room steals from, and who gets the place: the rule across hosts. Pure: no Redis and no clock, and
randomness comes in.

    thief     plan    a survey of the hosts that have work -> for each of its places one ticket to make an offer for
    origin    pick    its own line, as it is when the offer arrives -> the ticket that gets the place

Both look at a line in the same way. But the thief's copy is some milliseconds old, and meanwhile other thieves and the
origin's own instances were quicker. So an offer is of a *place*: the ticket that it names only stands for one of those
that wait, so that there are never more offers than tickets. The origin gives the place to whoever is next. Thus nobody
is passed by a ticket that came later, whatever races, and a place is refused only when nobody needs it.

**Next** is the first in line that the place can serve and that gains by the move: to read its whole prompt at the
thief, where nothing of it is known to be cached, must not take longer than it can expect to wait where it is. Where the
prompts of those at the head are partly cached at home, the one with the least of the next few goes: it loses least.

**Elders first.** A place is for the thief's own tickets, unless one of another host has waited half as long again and
half a second more. Strictly own first, those at the busy host wait for all that come to the others: with seven tenths
of the arrivals at one of three hosts, the 99th percentile of time to first token was 1.3 times that of one line for
all, and is 1.1 times (`benchmarks/skew`). A host's own wait at most about two thirds of what others do.

**No herd.** Thieves wake at the same moment. Each draws two hosts and prefers the one whose next ticket has waited
longer, which evens out the waits of all; it names one of the first few tickets at random. What others have named
already is as good as gone: it is neither named again nor counted for `min_load_score`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from random import Random

from broker.cluster.records import HostLoad, Place, Theft, TicketRecord
from broker.types import Role

LOOK = 16
"""Tickets that are compared by what they have cached."""
SPREAD = 4
"""Tickets at the head of a line of which a thief names one."""
ELDER_TIMES = 1.5
ELDER_MS = 500
"""A ticket goes before those of the place's own host when it has waited so many times as long, and so much more."""


def pick(
    role: Role,
    models: Collection[str],
    line: Sequence[TicketRecord],
    token_ms: float,
    *,
    skip: Collection[str] = (),
) -> TicketRecord | None:
    """Who should get a place at an instance of another host. `models` is empty where it serves all of them.

    `line` is a host's, in the order in which it is to be served, and complete at its head: a ticket's position is what
    it expects to wait. Those in `skip`, by their idents, are about to leave it.
    """
    ahead: Counter[int] = Counter()
    found: list[TicketRecord] = []
    for ticket in line:
        if ticket.ident in skip:
            continue
        ahead[ticket.home] += 1
        if not _serves(role, models, ticket) or not _gains(ticket, ahead[ticket.home], token_ms):
            continue
        if found and ticket.priority != found[0].priority:
            break
        found.append(ticket)
        if not ticket.cached or len(found) == LOOK:
            break
    return min(found, key=_cached, default=None)


def plan(
    places: Sequence[Place],
    hosts: Sequence[HostLoad],
    *,
    min_load_score: int,
    token_ms: float,
    most: int,
    rng: Random,
) -> list[Theft]:
    """What to make offers for; `hosts` are the others, as of one survey.

    At most `most` thefts, never more than a place has room for, and never two for one ticket. The places take turns, so
    that none is filled while another is idle. A host is left alone when fewer than `min_load_score` would wait there.
    """
    victims = [_Victim(host, min_load_score) for host in hosts]
    turns = rng.sample(places, len(places))
    room = {place.slot: place.room for place in places}
    thefts: list[Theft] = []
    while turns and len(thefts) < most:
        place = turns.pop(0)
        theft = _steal(place, victims, token_ms, rng)
        if theft is None:
            continue  # and there will be none for this place
        thefts.append(theft)
        room[place.slot] -= 1
        if room[place.slot] > 0:
            turns.append(place)
    return thefts


def is_elder(waited_ms: int, own_waited_ms: int) -> bool:
    """Whether a ticket of another host goes before one of our own."""
    return waited_ms > ELDER_TIMES * own_waited_ms + ELDER_MS


class _Victim:
    """A host in the eyes of one plan."""

    def __init__(self, host: HostLoad, min_load_score: int) -> None:
        self.host = host
        self.named = {ticket.ident for ticket in host.line if ticket.claimed}
        self.spare = host.tickets - len(self.named) - max(1, min_load_score) + 1
        """How many may be stolen."""

    def next(self, place: Place, token_ms: float, besides: Collection[str] = ()) -> TicketRecord | None:
        """Whom the place would go to, if those `besides` had theirs already."""
        if self.spare <= 0 or place.machine not in (None, self.host.machine):
            return None
        ticket = pick(place.role, place.models, self.host.line, token_ms, skip=self.named.union(besides))
        if ticket is None or (place.own_waited_ms is not None and not is_elder(ticket.waited_ms, place.own_waited_ms)):
            return None
        return ticket

    def take(self, first: TicketRecord, place: Place, token_ms: float, rng: Random) -> Theft:
        """Names one of the next few, of which `first` is the first."""
        few = {first.ident: first}
        while len(few) < min(SPREAD, self.spare):
            another = self.next(place, token_ms, few)
            if another is None or another.priority != first.priority:
                break
            few[another.ident] = another
        ticket = rng.choice(list(few.values()))
        self.named.add(ticket.ident)
        self.spare -= 1
        return Theft(place.slot, self.host, ticket)


def _steal(place: Place, victims: Sequence[_Victim], token_ms: float, rng: Random) -> Theft | None:
    found: list[tuple[_Victim, TicketRecord]] = []
    for victim in rng.sample(victims, len(victims)):
        first = victim.next(place, token_ms)
        if first is not None:
            found.append((victim, first))
            if len(found) == 2:
                break
    if not found:
        return None
    victim, first = max(found, key=_waited)
    return victim.take(first, place, token_ms, rng)


def _serves(role: Role, models: Collection[str], ticket: TicketRecord) -> bool:
    return role == ticket.role and (ticket.model is None or not models or ticket.model in models)


def _gains(ticket: TicketRecord, position: int, token_ms: float) -> bool:
    """`position` of its home's line, from 1. Without experience any instance that is idle is better than waiting."""
    return ticket.pace_ms is None or ticket.prompt * token_ms <= position * ticket.pace_ms


def _cached(ticket: TicketRecord) -> int:
    return ticket.cached


def _waited(found: tuple[_Victim, TicketRecord]) -> int:
    return found[1].waited_ms
