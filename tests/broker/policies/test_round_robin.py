from __future__ import annotations

from collections import Counter

import pytest

from broker.policies.round_robin import SETS, RoundRobin
from broker.route import RouteRequest
from tests.support.loads import FakeLoads

REQUEST = RouteRequest()


def steps(policy: RoundRobin, view: FakeLoads, count: int) -> list[int]:
    return [policy.pick(REQUEST, view) - int(view.slots[0]) for _ in range(count)]


def test_goes_around_in_the_order_of_the_view() -> None:
    assert steps(RoundRobin(0.0), FakeLoads(3), 7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(("frontend", "start"), [(0, 0), (1, 2), (2, 5), (3, 7)])
def test_frontend_k_of_n_starts_at_its_share_of_the_circle(frontend: int, start: int) -> None:
    assert steps(RoundRobin(frontend / 4), FakeLoads(10), 1) == [start]


def test_load_does_not_count() -> None:
    view = FakeLoads(2).having(in_flight=[50, 0], load=[50, 0], tokens=[50, 0])
    assert steps(RoundRobin(0.0), view, 4) == [0, 1, 0, 1]


def test_models_whose_requests_alternate_reach_all_of_their_instances() -> None:
    policy = RoundRobin(0.0)
    here, there = FakeLoads(2), FakeLoads(2).having(slots=[200, 201])
    counts = Counter(policy.pick(REQUEST, view) for _ in range(10) for view in (here, there))
    assert counts == {100: 5, 101: 5, 200: 5, 201: 5}


def test_turns_are_forgotten_oldest_first_so_that_they_stay_bounded() -> None:
    policy = RoundRobin(0.0)
    for first in range(SETS + 10):
        policy.pick(REQUEST, FakeLoads(2).having(slots=[first, first + 1]))
    assert len(policy._turns) == SETS
    assert steps(policy, FakeLoads(2).having(slots=[SETS + 9, SETS + 10]), 1) == [1]
    assert steps(policy, FakeLoads(2).having(slots=[0, 1]), 1) == [0]
