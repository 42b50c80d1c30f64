"""An origin answers offers: tickets stay in line while Redis is asked, and who is next is decided after its answer."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from broker import wire
from broker.cluster.borrowing import Borrowing
from broker.cluster.origin import Offered, Origin
from broker.cluster.records import Offer, encode_instance
from broker.cluster.store import StoreAway
from broker.scheduler.lines import Ident, Ticket
from broker.table import SchedulerEvent
from broker.types import Instance, Role

S = 1_000_000_000
INSTANCE = Instance(url="http://10.0.0.1:1")


class Case:
    """A line of tickets, and a Redis that says `says` of each offer, after `meanwhile` has happened."""

    def __init__(self) -> None:
        self.own = Borrowing()
        self.waits: dict[Ident, Ticket] = {}
        self.grants: dict[int, str] = {}
        """Lease, by the ticket's number."""
        self.events: Counter[SchedulerEvent] = Counter()
        self.asked: list[str] = []
        self.says: list[bool] | Exception = []
        self.meanwhile: Callable[[], None] = lambda: None
        here: Any = SimpleNamespace(
            own=self.own,
            line=self,
            token_ms=0.0,
            clock=lambda: 100 * S,
            count=lambda event, number: self.events.update({event: number}),
            sweep=lambda: None,
        )
        self.origin = Origin(here, self, "term")  # type: ignore[arg-type]  # the store, as far as it is asked

    def wait(self, *numbers: int, model: str | None = None) -> None:
        for number in numbers:
            pool = Role.MIXED, model
            self.waits[0, 1, number] = Ticket((0, 1, number), pool, 0, 10, 1, "", number * S, 900 * S, model=model)

    def answer(self, *leases: str) -> None:
        instance = encode_instance(INSTANCE)
        offers = [Offered(Offer(lease, "thief", "thief", "0.1.1", 1, instance), INSTANCE) for lease in leases]
        asyncio.run(self.origin.answer(offers))

    @property
    def in_line(self) -> list[int]:
        return sorted(ident[2] for ident in self.waits)

    @property
    def returned(self) -> list[str]:
        return sorted(lease.id for lease in self.own.returns)

    # -- the line, and Redis -------------------------------------------------------------------------------

    def front(self, limit: int) -> list[tuple[int, Ticket]]:
        return [(each.offered_ns, each) for _, each in sorted(self.waits.items())][:limit]

    def paces_ms(self, slots: set[int]) -> dict[int, float]:
        return {}

    def lend(self, ident: Ident) -> Ticket | None:
        return self.waits.pop(ident, None)

    def grant_abroad(self, ticket: Ticket, lease: wire.RemoteLease, name: str, instance: bytes) -> None:
        self.grants[ticket.ident[2]] = lease.lease

    async def accept(self, term: str, offers: Sequence[tuple[str, str]]) -> list[bool]:
        self.asked += [lease for lease, _ in offers]
        self.meanwhile()
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


@pytest.fixture
def case() -> Case:
    return Case()


def test_places_go_to_those_that_are_next(case: Case) -> None:
    case.wait(1, 2, 3)
    case.says = [True, True]
    case.answer("a", "b")
    assert case.grants == {1: "a", 2: "b"}
    assert case.in_line == [3]
    assert case.own.leases == ["a", "b"]


def test_nobody_leaves_the_line_while_redis_is_asked(case: Case) -> None:
    seen: list[list[int]] = []
    case.wait(1, 2)
    case.says = [True]
    case.meanwhile = lambda: seen.append(case.in_line)
    case.answer("a")
    assert seen == [[1, 2]]


def test_what_redis_does_not_give_changes_nothing(case: Case) -> None:
    case.wait(1, 2)
    case.says = [False, True]
    case.answer("a", "b")
    assert case.grants == {1: "b"}
    assert case.in_line == [2]
    assert case.returned == []


def test_a_redis_that_does_not_answer_costs_nobody_their_place_and_leases_are_given_back(case: Case) -> None:
    """It may have accepted, and not been able to say so."""
    case.wait(1, 2)
    case.says = StoreAway("gone")
    with pytest.raises(StoreAway):
        case.answer("a", "b")
    assert case.grants == {}
    assert case.in_line == [1, 2]
    assert case.returned == ["a", "b"]


def test_who_was_served_meanwhile_makes_room_for_the_next(case: Case) -> None:
    case.wait(1, 2)
    case.says = [True]
    case.meanwhile = lambda: case.waits.clear() or case.wait(2)
    case.answer("a")
    assert case.grants == {2: "a"}


def test_a_place_that_nobody_needs_any_more_goes_back(case: Case) -> None:
    case.wait(1)
    case.says = [True]
    case.meanwhile = case.waits.clear
    case.answer("a")
    assert case.grants == {}
    assert case.returned == ["a"]
    assert case.events[SchedulerEvent.CLUSTER_DECLINED] == 1


def test_redis_is_not_asked_for_what_nobody_can_use(case: Case) -> None:
    case.answer("a")
    case.wait(1)
    case.says = [True]
    case.answer("b", "c")
    assert case.asked == ["b"]
    assert case.returned == ["a", "c"]
    assert case.grants == {1: "b"}
