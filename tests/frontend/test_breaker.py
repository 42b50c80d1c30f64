"""The breaker's rules; time is passed in."""

from __future__ import annotations

from frontend.breaker import Breaker


def opened(failures: int = 3, slot: int = 1, now: float = 0.0) -> Breaker:
    breaker = Breaker(3, 5.0)
    for _ in range(failures):
        breaker.failed(slot, 1, now)
    return breaker


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    assert opened(2).open_slots(0) == []
    assert opened(3).open_slots(0) == [1]


def test_a_success_in_between_begins_the_count_anew() -> None:
    breaker = opened(2)
    breaker.succeeded(1)
    breaker.failed(1, 1, 0)
    assert breaker.open_slots(0) == []
    assert breaker.failures(1) == 1


def test_after_its_time_one_request_tries_and_the_others_go_on_avoiding() -> None:
    breaker = opened()
    assert breaker.open_slots(4.9) == [1]
    assert breaker.open_slots(5.0) == []
    breaker.tries(1, 5.0)
    assert breaker.open_slots(5.1) == [1]


def test_a_trial_that_succeeds_closes_it_and_one_that_fails_opens_it_again() -> None:
    breaker = opened()
    breaker.tries(1, 5.0)
    breaker.failed(1, 1, 6.0)
    assert breaker.open_slots(10.9) == [1]
    assert breaker.open_slots(11.0) == []
    breaker.tries(1, 11.0)
    breaker.succeeded(1)
    assert breaker.open_slots(11.0) == []


def test_a_trial_that_never_ends_does_not_keep_it_open_for_ever() -> None:
    breaker = opened()
    breaker.tries(1, 5.0)
    assert breaker.open_slots(10.0) == []


def test_another_instance_in_the_slot_begins_without_blame() -> None:
    breaker = opened(2)
    breaker.failed(1, 2, 0)
    assert breaker.failures(1) == 1


def test_the_least_bad_has_failed_least_then_rests_shortest() -> None:
    breaker = Breaker(1, 5.0)
    for slot, failures, now in ((1, 3, 0.0), (2, 1, 2.0), (3, 1, 1.0)):
        for _ in range(failures):
            breaker.failed(slot, 1, now)
    assert breaker.least_bad([1, 2, 3]) == 3
    assert breaker.least_bad([1, 2]) == 2


def test_a_first_byte_lets_others_in_again_but_forgives_nothing() -> None:
    breaker = Breaker(3, 5.0)
    for _ in range(3):
        breaker.failed(1, 1, now=0.0)
    assert breaker.open_slots(1.0) == [1]
    breaker.answers(1)
    assert breaker.open_slots(1.0) == []
    breaker.failed(1, 1, now=2.0)
    assert breaker.open_slots(3.0) == [1]
    breaker.answers(1)
    breaker.succeeded(1)
    assert breaker.failures(1) == 0
