"""`request_num` and `process_tokens`: the smallest of one live counter."""

from __future__ import annotations

from random import Random

from broker.policies.process_tokens import ProcessTokens
from broker.policies.request_num import RequestNum
from broker.route import RouteRequest
from tests.support.loads import FakeLoads

REQUEST = RouteRequest()


def test_request_num_takes_the_fewest_requests_whatever_their_size() -> None:
    view = FakeLoads(3).having(in_flight=[3, 1, 2], tokens=[1, 900, 1], load=[0, 9, 0])
    assert RequestNum(Random(1)).pick(REQUEST, view) == 101


def test_process_tokens_takes_the_fewest_tokens_however_many_requests() -> None:
    view = FakeLoads(3).having(in_flight=[1, 1, 9], tokens=[700, 800, 600], load=[0, 0, 9])
    assert ProcessTokens(Random(1)).pick(REQUEST, view) == 102


def test_only_equals_are_drawn() -> None:
    view = FakeLoads(5).having(in_flight=[4, 2, 7, 2, 2])
    policy = RequestNum(Random(1))
    assert {policy.pick(REQUEST, view) for _ in range(200)} == {101, 103, 104}


def test_two_frontends_on_the_same_counters_level_held_requests_exactly() -> None:
    view = FakeLoads(8)
    frontends = [RequestNum(Random(k)) for k in (0, 1)]
    for request in range(128):
        view.in_flight[frontends[request % 2].pick(REQUEST, view) - 100] += 1
    assert view.in_flight.tolist() == [16] * 8


def test_numbers_at_the_end_of_the_range_compare_exactly() -> None:
    view = FakeLoads(2).having(in_flight=[2**62 + 1, 2**62])
    assert RequestNum(Random(1)).pick(REQUEST, view) == 101
