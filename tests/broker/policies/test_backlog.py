"""How much of a queue time has done."""

from __future__ import annotations

import pytest

from broker.policies.backlog import DOUBT, Backlog
from tests.support.loads import vector

SLOTS = vector([3, 5])


def served(backlog: Backlog, tokens: int = 1000, each_s: float = 1.0, times: int = 400) -> float:
    """A past in which slot 3 computes prompts of so many tokens in so much time; returns the time it ends at."""
    now = 0.0
    for _ in range(times):
        backlog.left(SLOTS, vector([tokens, 0]), now)
        now += each_s
        backlog.left(SLOTS, vector([0, 0]), now)
    return now


def test_without_a_past_all_that_is_queued_is_left() -> None:
    assert Backlog(8).left(SLOTS, vector([700, 0]), 5.0).tolist() == [700, 0]


def test_of_two_equal_queues_the_older_one_is_nearly_done() -> None:
    backlog = Backlog(8)
    now = served(backlog)
    backlog.left(SLOTS, vector([1000, 0]), now)
    left = backlog.left(SLOTS, vector([1000, 1000]), now + 0.3)
    assert left.tolist() == [pytest.approx(700, rel=0.02), 1000]


def test_a_queue_that_shrinks_begins_to_stand_anew() -> None:
    backlog = Backlog(8)
    now = served(backlog)
    backlog.left(SLOTS, vector([3000, 0]), now)
    assert backlog.left(SLOTS, vector([2000, 0]), now + 1.0).tolist() == [2000, 0]
    assert backlog.left(SLOTS, vector([2000, 0]), now + 1.5).tolist() == [pytest.approx(1500, rel=0.02), 0]


def test_what_is_overdue_is_not_taken_for_done() -> None:
    backlog = Backlog(8)
    now = served(backlog)
    backlog.left(SLOTS, vector([1000, 0]), now)
    assert backlog.left(SLOTS, vector([1000, 0]), now + 1e6).tolist() == [1000 * DOUBT, 0]


def test_own_prompts_count_from_the_moment_they_are_sent() -> None:
    backlog = Backlog(8)
    now = served(backlog)
    backlog.add(5, 1000, now)
    assert backlog.left(SLOTS, vector([0, 1000]), now + 0.25).tolist() == [0, pytest.approx(750, rel=0.02)]


def test_a_prompt_that_is_taken_back_at_once_teaches_nothing() -> None:
    backlog = Backlog(8)
    backlog.add(5, 1000, 1.0)
    backlog.left(SLOTS, vector([0, 0]), 1.0)
    assert backlog.left(SLOTS, vector([500, 0]), 2.0).tolist() == [500, 0]
