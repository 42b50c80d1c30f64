"""The admission queue: order, priorities, fairness, stealing, bounds. Pure, so every rule is looked at alone."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from broker.errors import QueueFull
from broker.scheduler.lines import Ident, Ticket
from broker.scheduler.queue import AdmissionQueue, Grant
from broker.types import Role

POOL, OTHER = (Role.MIXED, "m"), (Role.MIXED, "n")
SECOND = 1_000_000_000
AGING = 10 * SECOND
NEVER = 1 << 60
NORMAL = 1


def queue(tickets: int = 1000, tokens: int = 1 << 40, aging: int = AGING, token_ns: float = 0.0) -> AdmissionQueue:
    return AdmissionQueue(tickets, tokens, aging, token_ns)


_numbers = itertools.count()


def ticket(
    number: int | None = None,
    *,
    at: int = 0,
    home: int = 0,
    cost: int = 1,
    priority: int = NORMAL,
    key: str = "",
    until: int = NEVER,
    pool: tuple[Role, str | None] = POOL,
    cached: dict[int, int] | None = None,
) -> Ticket:
    ident = (0, 1, next(_numbers) + 1000 if number is None else number)
    return Ticket(ident, pool, home, cost, priority, key, at, until, cached or {})


def offer(queue: AdmissionQueue, *tickets: Ticket, now: int = 0) -> None:
    for each in tickets:
        queue.offer(each, now)


def granted(
    queue: AdmissionQueue, slot: int = 0, *, pools: tuple = (POOL,), now: int = 0, steal: bool = True
) -> int | None:
    """The number of the ticket that the slot is granted."""
    grant = queue.grant(slot, pools, now, steal=steal)
    return None if grant is None else grant.ticket.ident[2]


def drained(queue: AdmissionQueue, slot: int = 0, now: int = 0) -> list[int]:
    return list(iter(lambda: granted(queue, slot, now=now), None))


# -- order -------------------------------------------------------------------------------------------------


def test_tickets_are_granted_in_the_order_in_which_they_began_to_wait_not_in_that_of_arrival() -> None:
    q = queue()
    offer(q, ticket(1, at=10), ticket(3, at=30), ticket(2, at=20))
    assert drained(q) == [1, 2, 3]


def test_tickets_put_back_in_any_order_stand_where_they_stood() -> None:
    q = queue()
    offer(q, *(ticket(n, at=n) for n in range(6)))
    taken = [q.grant(0, [POOL], 0) for _ in range(4)]
    for grant in (taken[2], taken[0], taken[3], taken[1]):
        assert grant is not None
        q.put_back(grant.ticket, 0)
    assert drained(q) == [0, 1, 2, 3, 4, 5]


def test_a_ticket_that_is_offered_twice_waits_once() -> None:
    q = queue()
    offer(q, ticket(1), ticket(1), ticket(2))
    assert len(q) == 2
    assert drained(q) == [1, 2]


def test_a_withdrawn_ticket_is_never_granted() -> None:
    q = queue()
    offer(q, *(ticket(n, at=n) for n in range(4)))
    assert q.withdraw((0, 1, 0)) is not None
    assert q.withdraw((0, 1, 2)) is not None
    assert q.withdraw((0, 1, 2)) is None
    assert drained(q) == [1, 3]


def test_an_expired_ticket_is_removed_at_its_deadline() -> None:
    q = queue()
    offer(q, ticket(1, until=50), ticket(2, until=40), ticket(3))
    assert q.expire(39) == []
    assert [each.ident[2] for each in q.expire(50)] == [2, 1]
    assert drained(q) == [3]


def test_only_tickets_that_the_instance_serves_are_granted() -> None:
    q = queue()
    offer(q, ticket(1, pool=OTHER), ticket(2, at=5))
    assert granted(q, pools=(POOL,)) == 2
    assert granted(q, pools=(POOL,)) is None
    assert granted(q, pools=(POOL, OTHER)) == 1


def test_of_several_pools_the_older_ticket_goes_first() -> None:
    q = queue()
    offer(q, ticket(1, at=20), ticket(2, at=10, pool=OTHER))
    assert granted(q, pools=(POOL, OTHER)) == 2


# -- priorities --------------------------------------------------------------------------------------------


def test_a_higher_priority_goes_first() -> None:
    q = queue()
    offer(q, ticket(1, priority=2), ticket(2, priority=1, at=1), ticket(3, priority=0, at=2))
    assert drained(q) == [3, 2, 1]


def test_a_lower_priority_is_passed_only_by_those_that_came_within_the_aging_time() -> None:
    q = queue()
    offer(q, ticket(1, priority=1), ticket(2, priority=0, at=AGING - 1), ticket(3, priority=0, at=AGING + 1))
    assert drained(q) == [2, 1, 3]


@given(st.lists(st.tuples(st.integers(0, 30 * SECOND), st.integers(0, 2)), max_size=40))
def test_nobody_starves(coming: list[tuple[int, int]]) -> None:
    """Whoever is granted before a ticket came at most the aging of their difference after it."""
    q = queue()
    tickets = [ticket(n, at=at, priority=priority) for n, (at, priority) in enumerate(coming)]
    offer(q, *tickets)
    order = [tickets[n] for n in drained(q)]
    for first, later in itertools.combinations(order, 2):
        assert first.offered_ns - later.offered_ns <= max(0, later.priority - first.priority) * AGING


# -- fairness ----------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(2, 5))
@settings(max_examples=60)
def test_lines_that_wait_all_the_time_get_equal_shares_of_tokens(seed: int, keys: int) -> None:
    """Within three times the greatest cost at any moment, however different the costs."""
    rng = random.Random(seed)
    q = queue(100_000)
    costs = [rng.randint(1, rng.choice([3, 50, 2000])) for _ in range(keys)]
    for k, n in itertools.product(range(keys), range(200)):
        offer(q, ticket(at=n, key=str(k), cost=rng.randint(1, costs[k])))
    served = dict.fromkeys(map(str, range(keys)), 0)
    left = dict.fromkeys(served, 200)
    while all(left.values()):
        grant = q.grant(0, [POOL], 0)
        assert grant is not None
        served[grant.ticket.key] += grant.ticket.prompt
        left[grant.ticket.key] -= 1
        assert max(served.values()) - min(served.values()) <= 3 * max(costs)


def test_a_key_with_many_requests_does_not_delay_another_keys_only_one() -> None:
    q = queue()
    offer(q, *(ticket(n, at=n, key="many") for n in range(100)), ticket(1000, at=100, key="one"))
    assert 1000 in [granted(q) for _ in range(3)]


def test_a_stolen_ticket_is_charged_to_its_line() -> None:
    q = queue()
    offer(q, *(ticket(n, at=n, key="a", cost=10) for n in range(4)), *(ticket(10 + n, at=n, key="b") for n in range(4)))
    keys = [grant.ticket.key for k in range(4) if (grant := q.grant(k % 2, [POOL], 0))]
    assert keys.count("a") <= 2


# -- stealing ----------------------------------------------------------------------------------------------


def test_an_instance_takes_its_own_tickets_before_it_steals() -> None:
    q = queue()
    offer(q, ticket(1, home=1, cost=100), ticket(2, home=0, at=50))
    assert granted(q, 0) == 2
    assert granted(q, 0, steal=False) is None
    assert granted(q, 0) == 1


def test_the_most_loaded_peer_by_tokens_is_robbed_not_the_one_with_the_longest_line() -> None:
    q = queue()
    offer(q, *(ticket(n, home=1) for n in range(5)), ticket(9, home=2, cost=100))
    assert granted(q, 0) == 9


def test_the_oldest_is_stolen_first() -> None:
    q = queue()
    offer(q, *(ticket(n, home=1, at=n) for n in range(6)))
    assert drained(q, 0) == [0, 1, 2, 3, 4, 5]


def test_what_is_cached_at_home_is_stolen_last() -> None:
    q = queue()
    offer(
        q, ticket(1, home=1, cost=10, cached={1: 8}), ticket(2, home=1, at=1, cost=10), ticket(3, home=1, at=2, cost=10)
    )
    assert drained(q, 0) == [2, 3, 1]


def test_what_the_thief_has_cached_as_well_is_no_loss() -> None:
    q = queue()
    offer(q, ticket(1, home=1, cost=10, cached={0: 8, 1: 8}), ticket(2, home=1, at=1, cost=10, cached={1: 4}))
    assert drained(q, 0) == [1, 2]


def test_the_most_loaded_peer_is_the_one_with_the_most_to_compute() -> None:
    q = queue()
    offer(q, ticket(1, home=1, cost=100, cached={1: 96}), ticket(2, home=2, at=1, cost=10))
    assert q.tokens == 14
    assert q.by_home() == {1: (1, 4), 2: (1, 10)}
    assert drained(q, 0) == [2, 1]


def test_a_ticket_is_not_stolen_when_its_prompt_takes_longer_than_its_wait() -> None:
    """At home they are granted every 100 ns; 200 uncached tokens take 200 ns, 50 take 50."""
    q = queue(token_ns=1.0)
    offer(q, *(ticket(n, home=1, at=n, cost=200) for n in range(5)))
    assert [granted(q, 1, now=now) for now in (100, 200)] == [0, 1]
    assert granted(q, 0, now=210) is None
    offer(q, ticket(7, home=1, at=9, cost=200, cached={0: 150}), now=210)
    assert granted(q, 0, now=210) == 7


def test_a_home_that_has_stopped_granting_is_robbed_after_all() -> None:
    q = queue(token_ns=1.0)
    offer(q, *(ticket(n, home=1, at=n, cost=200) for n in range(3)))
    assert granted(q, 1, now=100) == 0
    assert granted(q, 0, now=150) is None
    assert granted(q, 0, now=301) == 1


def test_a_grant_says_whether_it_was_stolen() -> None:
    q = queue()
    offer(q, ticket(1, home=1), ticket(2, home=0))
    assert [grant.stolen for _ in range(2) if (grant := q.grant(0, [POOL], 0))] == [False, True]


# -- instances that come and go ----------------------------------------------------------------------------


def test_tickets_of_a_home_that_is_gone_move_to_the_least_loaded_one_and_keep_their_order() -> None:
    q = queue()
    offer(q, *(ticket(n, home=5, at=n) for n in range(3)), ticket(9, home=1, cost=100, at=100))
    assert q.rehome(POOL, {1, 2}, 0) == []
    assert q.by_home() == {1: (1, 100), 2: (3, 3)}
    assert drained(q, 2) == [0, 1, 2, 9]


def test_tickets_that_nobody_serves_any_more_are_given_up() -> None:
    q = queue()
    offer(q, ticket(1), ticket(2, home=3), ticket(3, pool=OTHER))
    assert {each.ident[2] for each in q.rehome(POOL, (), 0)} == {1, 2}
    assert [each[2] for each in q.idents((0, 1))] == [3]


# -- bounds ------------------------------------------------------------------------------------------------


def test_beyond_its_bounds_the_queue_refuses_and_says_when_to_come_again() -> None:
    by_count, by_tokens = queue(tickets=2), queue(tokens=100)
    offer(by_count, ticket(1), ticket(2))
    offer(by_tokens, ticket(1, cost=60))
    for q, cost in ((by_count, 1), (by_tokens, 41)):
        with pytest.raises(QueueFull) as refused:
            q.offer(ticket(9, cost=cost), 0)
        assert 1 <= (refused.value.retry_after_s or 0) <= 60
    by_tokens.offer(ticket(3, cost=40), 0)


def test_a_request_larger_than_the_bound_waits_when_it_waits_alone() -> None:
    q = queue(tokens=100)
    offer(q, ticket(1, cost=1000))
    assert granted(q) == 1


def test_a_ticket_put_back_is_never_refused() -> None:
    q = queue(tickets=1)
    offer(q, ticket(1))
    grant = q.grant(0, [POOL], 0)
    assert grant is not None
    offer(q, ticket(2, at=1))
    q.put_back(grant.ticket, 0)
    assert drained(q) == [1, 2]


def test_withdrawn_tickets_take_no_room() -> None:
    """Clients that come and go in front of one that stays: what is kept follows what waits, not what has been."""
    q = queue()
    offer(q, ticket(0))
    for n in range(1, 5000):
        offer(q, ticket(n, at=n, until=n + 10**6))
        q.withdraw((0, 1, n))
    (home,) = q._pools[POOL].values()
    (line,) = home.lanes[NORMAL].lines.values()
    assert len(line.places) < 200
    assert len(q._deadlines) < 200


# -- whatever happens --------------------------------------------------------------------------------------

HOMES = 4
KEYS = ["", "a", "b"]


def lost(ticket: Ticket, slot: int) -> int:
    """What must be computed anew in `slot`."""
    return max(0, ticket.cost_at(slot) - ticket.cost_at(ticket.home))


class Anything(RuleBasedStateMachine):
    """Every ticket is in exactly one place: waiting, granted, or ended. Order holds between any two of one line."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = queue(tickets=12, tokens=300)
        self.now = 0
        self.number = 0
        self.waiting: dict[Ident, Ticket] = {}
        self.granted: dict[Ident, Grant] = {}
        self.slots = {POOL: {0, 1, 2, 3}, OTHER: {2, 3}}

    @property
    def tokens(self) -> int:
        return sum(t.cost_at(t.home) for t in self.waiting.values())

    @rule(
        home=st.integers(0, HOMES - 1),
        cost=st.integers(1, 60),
        priority=st.integers(0, 2),
        key=st.sampled_from(KEYS),
        pool=st.sampled_from([POOL, OTHER]),
        wait=st.integers(5, 200),
        late=st.integers(0, 5),
        cached=st.dictionaries(st.integers(0, HOMES - 1), st.integers(0, 70), max_size=HOMES),
    )
    def offer(
        self,
        home: int,
        cost: int,
        priority: int,
        key: str,
        pool: tuple,
        wait: int,
        late: int,
        cached: dict[int, int],
    ) -> None:
        self.now += 1
        self.number += 1
        home = home if home in self.slots[pool] else min(self.slots[pool], default=home)
        new = ticket(
            self.number,
            at=self.now - late,
            home=home,
            cost=cost,
            priority=priority,
            key=key,
            pool=pool,
            until=self.now + wait,
            cached=cached,
        )
        tokens = self.tokens + new.cost_at(home)
        fits = len(self.waiting) < 12 and tokens <= 300
        if fits or not self.waiting:
            self.queue.offer(new, self.now)
            self.waiting[new.ident] = new
        else:
            with pytest.raises(QueueFull):
                self.queue.offer(new, self.now)

    @rule(slot=st.integers(0, HOMES - 1), steal=st.booleans())
    def grant(self, slot: int, steal: bool) -> None:
        self.now += 1
        pools = [pool for pool, slots in self.slots.items() if slot in slots]
        grant = self.queue.grant(slot, pools, self.now, steal=steal)
        could = [t for t in self.waiting.values() if t.pool in pools and (steal or t.home == slot)]
        if grant is None:
            assert not could, "room, and nobody was granted it"
            return
        given_ = self.waiting.pop(grant.ticket.ident)
        assert given_ in could
        assert grant.slot == slot
        assert grant.stolen == (given_.home != slot)
        if grant.stolen:
            assert not [t for t in could if t.home == slot], "stole while its own waited"
        line = [
            t
            for t in could
            if (t.home, t.pool, t.priority, t.key) == (given_.home, given_.pool, given_.priority, given_.key)
        ]
        if grant.stolen:
            assert all(lost(given_, slot) <= lost(t, slot) for t in line), "lost more than it must"
            line = [t for t in line if lost(t, slot) == lost(given_, slot)]
        assert all(given_.offered_ns <= t.offered_ns for t in line), "out of order"
        self.granted[given_.ident] = grant

    @precondition(lambda self: self.granted)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        ident = data.draw(st.sampled_from(sorted(self.granted)))
        back = self.granted.pop(ident).ticket
        self.queue.put_back(back, self.now)
        self.waiting[ident] = back

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ident = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.queue.withdraw(ident) == self.waiting.pop(ident)
        assert self.queue.withdraw(ident) is None

    @rule(after=st.integers(0, 50))
    def expire(self, after: int) -> None:
        self.now += after
        due = {t.ident for t in self.waiting.values() if t.deadline_ns <= self.now}
        assert {t.ident for t in self.queue.expire(self.now)} == due
        for ident in due:
            del self.waiting[ident]

    @rule(pool=st.sampled_from([POOL, OTHER]), slots=st.sets(st.integers(0, HOMES - 1)))
    def change(self, pool: tuple, slots: set[int]) -> None:
        self.slots[pool] = slots
        lost = {t.ident for t in self.queue.rehome(pool, slots, self.now)}
        concerned = [t for t in self.waiting.values() if t.pool == pool]
        if not slots:
            assert lost == {t.ident for t in concerned}
            for ident in lost:
                del self.waiting[ident]
        else:
            assert not lost
            for each in concerned:
                if each.home not in slots:
                    moved = self.queue._places[each.ident[:2]][each.ident[2]].ticket
                    assert moved.home in slots
                    self.waiting[each.ident] = moved

    @invariant()
    def counts_are_true(self) -> None:
        assert set(self.queue.idents((0, 1))) == set(self.waiting)
        assert len(self.queue) == len(self.waiting)
        assert self.queue.tokens == self.tokens
        homes: dict[int, tuple[int, int]] = {}
        for each in self.waiting.values():
            count, tokens = homes.get(each.home, (0, 0))
            homes[each.home] = count + 1, tokens + each.cost_at(each.home)
        assert self.queue.by_home() == homes


Anything.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestAnything = Anything.TestCase
