"""`fd_metrics_score` and `fd_remote_metrics_score`: running + waiting-weight x waiting, never counted twice."""

from __future__ import annotations

from random import Random

import pytest

from broker.policies import Options
from broker.policies.fd_metrics_score import FdMetricsScore, score
from broker.policies.fd_remote_metrics_score import FdRemoteMetricsScore
from broker.route import RouteRequest
from broker.types import Trust
from tests.support.loads import FakeLoads

REQUEST = RouteRequest()


def local(weight: float) -> FdMetricsScore:
    return FdMetricsScore(Options(waiting_weight=weight), Random(1))


def remote(weight: float) -> FdRemoteMetricsScore:
    return FdRemoteMetricsScore(Options(waiting_weight=weight), Random(1))


def test_a_waiting_request_counts_its_weight() -> None:
    # 10 requests of which 4 wait, and 12 of which none does.
    view = FakeLoads(2).having(in_flight=[10, 12], load=[10, 12], waiting=[4, 0])
    for weight, chosen in ((0.0, 100), (1.0, 100), (1.4, 100), (1.6, 101), (10.0, 101)):
        assert local(weight).pick(REQUEST, view) == chosen
        assert remote(weight).pick(REQUEST, view) == chosen


def test_local_counts_the_requests_of_this_host_and_remote_those_of_others_too() -> None:
    view = FakeLoads(2).having(in_flight=[2, 3], load=[30, 3], waiting=[0, 0])
    assert local(1.0).pick(REQUEST, view) == 100
    assert remote(1.0).pick(REQUEST, view) == 101


def test_no_more_can_wait_than_are_there() -> None:
    # 8 waited when the first reported; since then all but 2 of its requests have ended: 2 x 3, not 2 + 2 x 8.
    view = FakeLoads(2).having(in_flight=[2, 7], load=[2, 7], waiting=[8, 0])
    assert score(view.load, view, 3.0).tolist() == [6, 7]
    assert local(3.0).pick(REQUEST, view) == remote(3.0).pick(REQUEST, view) == 100


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_unknown_waiting_counts_as_running(weight: float) -> None:
    view = FakeLoads(2).having(in_flight=[5, 6], load=[5, 6], waiting=[-1, -1])
    assert score(view.load, view, weight).tolist() == [5, 6]


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_a_stale_report_counts_nothing(weight: float) -> None:
    view = FakeLoads(2).having(in_flight=[5, 6], load=[5, 6], waiting=[5, 0], trust=[Trust.STALE, Trust.EXACT])
    assert score(view.load, view, weight).tolist() == [5, 6]


def test_a_polled_report_counts() -> None:
    view = FakeLoads(2).having(in_flight=[5, 6], load=[5, 6], waiting=[5, 0], trust=[Trust.APPROX, Trust.EXACT])
    assert remote(2.0).pick(REQUEST, view) == 101


def test_the_view_is_not_changed() -> None:
    view = FakeLoads(3).having(in_flight=[1, 2, 3], load=[1, 2, 3], waiting=[5, -1, 2], trust=[0, 1, 2])
    score(view.load, view, 2.0)
    assert view.waiting.tolist() == [5, -1, 2]
    assert view.load.tolist() == [1, 2, 3]


def test_scores_do_not_wrap_around() -> None:
    view = FakeLoads(2).having(in_flight=[2**62, 1], load=[2**62, 1], waiting=[2**62, 0])
    assert local(4.0).pick(REQUEST, view) == remote(4.0).pick(REQUEST, view) == 101
