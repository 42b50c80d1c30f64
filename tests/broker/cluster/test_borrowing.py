"""The origin's half: every ticket is in one place, and every lease that was ours is given back."""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker import wire
from broker.cluster.borrowing import MOST_RETURNS, Borrowing, Lease, line
from broker.cluster.records import Offer, as_waiting, decode
from broker.scheduler.lines import Ident, Ticket
from broker.types import Role

S = 1_000_000_000


def ticket(number: int, row: int = 0, **more: object) -> Ticket:
    fields = {"prompt": 100, "priority": 1, "key": "", "offered_ns": number * S, "deadline_ns": 900 * S, **more}
    return Ticket((row, 1, number), (Role.MIXED, "m"), 3, model="m", **fields)  # type: ignore[arg-type]  # test's own


def front(*tickets: Ticket) -> list[tuple[int, Ticket]]:
    return [(each.offered_ns, each) for each in tickets]


def offer(lease: str, field: str = "0.1.1:1", host: str = "thief") -> Offer:
    ident, _, version = field.rpartition(":")
    return Offer(lease, host, host, ident, int(version), b"")


def borrow(own: Borrowing, waiting: Ticket, lease: str = "l1") -> None:
    own.accepted(offer(lease))
    own.granted(offer(lease), waiting, 0)


def test_only_what_has_changed_is_published_again() -> None:
    own = Borrowing()
    one, two, three = ticket(1), ticket(2), ticket(3)
    first = own.changes(front(one, two))
    assert [new.field for new in first.new] == ["0.1.1:1", "0.1.2:2"]
    assert own.changes(front(one, two)) == ([], [])
    second = own.changes(front(two, three))
    assert second.gone == ["0.1.1:1"]
    assert [new.field for new in second.new] == ["0.1.3:3"]
    own.forget_published()  # a new term
    assert [new.field for new in own.changes(front(two, three)).new] == ["0.1.2:4", "0.1.3:5"]


def test_a_record_says_what_the_rule_needs_and_nothing_of_the_client() -> None:
    own = Borrowing()
    secret = ticket(1, key="digest of a secret", cached={3: 60, 4: 90})
    (new,) = own.changes(front(secret)).new
    waiting = decode(as_waiting, new.record)
    assert (waiting.model, waiting.prompt, waiting.cached, waiting.priority, waiting.home) == ("m", 100, 60, 1, 3)
    assert b"secret" not in new.record
    (seen,) = line(front(secret), {3: 12.5}, 5 * S)
    assert (seen.ident, seen.prompt, seen.cached, seen.waited_ms, seen.pace_ms) == ("0.1.1", 100, 60, 4000, 12.5)


def test_the_version_that_an_offer_named_is_used_up_whoever_got_the_place() -> None:
    own = Borrowing()
    named, next_up = ticket(1), ticket(2)
    own.changes(front(named, next_up))
    own.accepted(offer("l1", "0.1.1:1"))
    own.granted(offer("l1", "0.1.1:1"), next_up, 0)
    changes = own.changes(front(named))
    assert changes.gone == ["0.1.2:2"]  # accept.lua has removed the other one
    assert [new.field for new in changes.new] == ["0.1.1:3"]


def test_a_client_that_leaves_before_its_frontend_has_answered_returns_the_place() -> None:
    own = Borrowing()
    borrow(own, ticket(1))
    assert own.withdrawn((0, 1, 1))
    assert not own.withdrawn((0, 1, 1))
    assert own.returns == [Lease("l1", "thief")]
    assert own.leases == []
    assert own.is_idle


def test_a_lease_is_renewed_until_its_request_is_over_and_then_given_back() -> None:
    own = Borrowing()
    borrow(own, ticket(1))
    assert (0, 1, 1) in own
    own.taken((0, 1, 1))
    assert (0, 1, 1) not in own
    assert own.leases == ["l1"]
    own.ended([wire.RemoteLease("l1", "thief", failed=True)])
    assert own.leases == []
    assert own.returns == [Lease("l1", "thief", used=True, failed=True)]
    own.gave_back(own.returns)
    assert own.returns == []


def test_a_place_that_a_frontend_could_not_use_puts_its_ticket_back() -> None:
    own = Borrowing()
    waiting = ticket(1)
    borrow(own, waiting)
    assert own.returned(waiting.ident) == waiting
    assert own.returned(waiting.ident) is None
    assert own.returns == [Lease("l1", "thief", failed=True)]


def test_what_runs_is_known_to_the_next_scheduler_by_its_frontends() -> None:
    own = Borrowing()
    own.held([wire.RemoteLease("l1", "thief"), wire.RemoteLease("l2", "thief")], (0, 1))
    assert own.leases == ["l1", "l2"]
    own.ended([wire.RemoteLease("l2", "thief")])
    own.prune([(1, 1)])  # the frontend is dead
    assert own.leases == []
    assert sorted(lease.id for lease in own.returns) == ["l1", "l2"]


def test_a_frontend_that_does_not_react_is_told_by_its_oldest_grant() -> None:
    own = Borrowing()
    own.granted(offer("l1"), ticket(1), 5 * S)
    assert own.unheeded(5 * S) == set()
    assert own.unheeded(6 * S) == {(0, 1)}
    assert own.forget((0, 1)) == 1
    assert own.unheeded(6 * S) == set()


def test_returns_are_bounded_while_redis_is_away() -> None:
    own = Borrowing()
    for k in range(MOST_RETURNS + 5):
        own.decline(offer(f"l{k}"))
    assert len(own.returns) == MOST_RETURNS
    assert own.returns[-1].id == f"l{MOST_RETURNS + 4}"


class Life(RuleBasedStateMachine):
    """Any order of offers, answers, clients and frontends."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Borrowing()
        self.numbers = itertools.count(1)
        self.waiting: dict[Ident, Ticket] = {}
        self.granted: dict[Ident, str] = {}
        self.running: dict[str, Ident] = {}
        self.back: set[str] = set()
        """Leases that must have been given back."""

    @rule(row=st.integers(0, 1))
    def comes(self, row: int) -> None:
        new = ticket(next(self.numbers), row)
        self.waiting[new.ident] = new

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), needed=st.booleans())
    def offered(self, data: st.DataObject, needed: bool) -> None:
        self.own.changes(front(*self.waiting.values()))
        chosen = data.draw(st.sampled_from(sorted(self.waiting)))
        lease = f"l{next(self.numbers)}"
        self.own.accepted(offer(lease))
        if needed:
            self.own.granted(offer(lease), self.waiting.pop(chosen), 0)
            self.granted[chosen] = lease
        else:
            self.own.decline(offer(lease))
            self.back.add(lease)

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def client_leaves(self, data: st.DataObject) -> None:
        ident = data.draw(st.sampled_from(sorted(self.granted)))
        assert self.own.withdrawn(ident)
        self.back.add(self.granted.pop(ident))

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), usable=st.booleans())
    def heard(self, data: st.DataObject, usable: bool) -> None:
        ident = data.draw(st.sampled_from(sorted(self.granted)))
        lease = self.granted.pop(ident)
        if usable:
            self.own.taken(ident)
            self.running[lease] = ident
        else:
            back = self.own.returned(ident)
            assert back is not None
            self.waiting[ident] = back
            self.back.add(lease)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def over(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[lease]
        self.own.ended([wire.RemoteLease(lease, "thief")])
        self.back.add(lease)

    @rule(row=st.integers(0, 1))
    def frontend_dies(self, row: int) -> None:
        self.own.forget((row, 1))
        for ident in [ident for ident in self.granted if ident[0] == row]:
            self.back.add(self.granted.pop(ident))
        for lease in [lease for lease, ident in self.running.items() if ident[0] == row]:
            del self.running[lease]
            self.back.add(lease)
        self.waiting = {ident: waits for ident, waits in self.waiting.items() if ident[0] != row}

    @rule()
    def term_ends(self) -> None:
        self.own.forget_published()

    @invariant()
    def every_lease_is_held_or_given_back(self) -> None:
        assert sorted(self.own.leases) == sorted([*self.granted.values(), *self.running])
        assert {lease.id for lease in self.own.returns} == self.back

    @invariant()
    def a_ticket_is_in_one_place(self) -> None:
        away = {ident for ident in (*self.waiting, *self.granted) if ident in self.own}
        assert away == set(self.granted)
        assert not away & set(self.waiting)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=30)
