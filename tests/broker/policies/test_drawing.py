"""`random` and `power_of_two`: the policies that draw."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from broker.policies.base import FEW, least
from broker.policies.power_of_two import PowerOfTwo
from broker.policies.random import RandomChoice
from broker.route import RouteRequest
from tests.support.loads import FakeLoads

REQUEST = RouteRequest()


@given(st.lists(st.one_of(st.integers(0, 3), st.floats(0, 1e9)), min_size=1, max_size=2 * FEW), st.integers(0, 2**32))
def test_the_least_of_few_is_drawn_as_that_of_many(scores: list[float], seed: int) -> None:
    ties = np.flatnonzero(np.array(scores) == min(scores))
    drawn = int(ties[0]) if len(ties) == 1 else int(ties[int(Random(seed).random() * len(ties))])
    assert least(np.array(scores), Random(seed)) == drawn


def test_random_does_not_look_at_load() -> None:
    # Binomial(2000, 1/2): 380 away from the mean is 17 standard deviations.
    view = FakeLoads(2).having(in_flight=[10**6, 0], load=[10**6, 0], tokens=[10**6, 0])
    policy = RandomChoice(Random(1))
    assert 620 < Counter(policy.pick(REQUEST, view) for _ in range(2000))[100] < 1380


def test_power_of_two_takes_the_emptier_of_a_pair() -> None:
    policy = PowerOfTwo(Random(1))
    view = FakeLoads(2).having(in_flight=[3, 2])
    assert {policy.pick(REQUEST, view) for _ in range(100)} == {101}


def test_power_of_two_never_takes_the_fullest_because_it_draws_two_distinct_ones() -> None:
    policy = PowerOfTwo(Random(1))
    view = FakeLoads(8).having(in_flight=[0, 1, 2, 3, 4, 5, 6, 7])
    assert {policy.pick(REQUEST, view) for _ in range(2000)} == set(range(100, 107))


def test_power_of_two_chooses_by_rank_among_pairs() -> None:
    # The emptiest of n is in 2/n of the pairs: 1,000 of 4,000 choices; sd = sqrt(4000 * 1/4 * 3/4) = 27, bound 5 sd.
    policy = PowerOfTwo(Random(1))
    view = FakeLoads(8).having(in_flight=[1, 2, 3, 0, 4, 5, 6, 7])
    assert abs(Counter(policy.pick(REQUEST, view) for _ in range(4000))[103] - 1000) < 137
