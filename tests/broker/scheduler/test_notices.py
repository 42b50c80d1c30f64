"""The scheduler's work for the prefix index: a share of each turn, and never a slot's past for its next instance."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from broker.candidates import Entry
from broker.config import Config, Scheduler, Shm
from broker.prefix import PrefixIndex, create_prefix, run_layout
from broker.route import RouteRequest
from broker.scheduler.notices import SHARE_S, WAITING, Notices
from broker.table import SchedulerEvent, State
from broker.types import Instance
from broker.wire import RoutingNotices

PROMPT = "The quick brown fox jumps over the lazy dog, and so on. " * 40
EVICT_S, KEEP_S = 60.0, 120.0


class Loop:
    """Turns and timers, by hand."""

    def __init__(self) -> None:
        self.ready: list[Callable[[], None]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.cancelled = False

    def call_soon(self, call: Callable[[], None]) -> None:
        self.ready.append(call)

    def call_later(self, delay: float, call: Callable[[], None]) -> Loop:
        self.timers.append((delay, call))
        return self

    def cancel(self) -> None:
        self.cancelled = True

    def turn(self) -> None:
        ready, self.ready = self.ready, []
        for call in ready:
            call()


class Bench:
    """A fleet, the scheduler's half and one frontend's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        scheduler = Scheduler(prefix_blocks=1 << 17, eviction_interval_secs=EVICT_S, eviction_duration_mins=KEEP_S / 60)
        self.config = Config(shm=Shm(dir=str(path), slots=8, frontends=2), scheduler=scheduler)
        create_prefix(path, run_layout(self.config))
        self.generations = {0: 1, 1: 1, 2: 5}
        self.events = [0] * len(SchedulerEvent)
        self.seconds: Iterator[float] = itertools.repeat(0.0)
        self.index = PrefixIndex.of_run(path, self.config, 1)
        self.start()

    def start(self) -> None:
        """A scheduler takes over."""
        self.loop = Loop()
        attach = cast("Any", Notices.attach)
        self.notices: Notices = attach(self.path, self.config, self, self.events, self.loop)
        self.notices._clock = lambda: next(self.seconds)

    def entries(self) -> list[Entry]:
        instance = Instance(url="http://a:1")
        return [Entry(slot, generation, State.READY, instance) for slot, generation in self.generations.items()]

    def note(self, text: str, slot: int) -> RoutingNotices:
        self.index.note(RouteRequest(prompt=text), slot)
        notices = self.index.batch()
        assert notices is not None
        return notices

    def settle(self) -> None:
        while not self.notices.is_idle:
            self.loop.turn()

    def who_has(self, text: str) -> set[int]:
        index = PrefixIndex.of_run(self.path, self.config, 0)  # one that noted nothing itself
        return set(index.match(RouteRequest(prompt=text)).depths.nonzero()[0].tolist())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_what_a_frontend_notes_is_entered_and_counted(bench: Bench) -> None:
    bench.notices.hear(bench.note(PROMPT, 2))
    bench.settle()
    assert bench.who_has(PROMPT) == {2}
    assert bench.events[SchedulerEvent.NOTICES_APPLIED] == 1


def test_a_turn_of_the_loop_takes_its_share_and_lets_others_have_theirs(bench: Bench) -> None:
    bench.seconds = itertools.count(step=SHARE_S / 2)
    for number in range(20):
        bench.notices.hear(bench.note(f"{number} " + PROMPT, 0))
    turns = 0
    while not bench.notices.is_idle:
        before = bench.events[SchedulerEvent.NOTICES_APPLIED]
        bench.loop.turn()
        assert 1 <= bench.events[SchedulerEvent.NOTICES_APPLIED] - before <= 2
        turns += 1
    assert turns >= 10


def test_more_than_can_be_entered_is_dropped_the_oldest_first(bench: Bench) -> None:
    first = bench.note("first " + PROMPT, 0)
    bench.notices.hear(first)
    for _ in range(WAITING):
        bench.notices.hear(bench.note(PROMPT, 1))
    bench.settle()
    assert bench.events[SchedulerEvent.NOTICES_DROPPED] == 1
    assert (bench.who_has("first " + PROMPT), bench.who_has(PROMPT)) == (set(), {1})


def test_those_that_leave_are_forgotten_and_their_late_notices_count_for_nobody(bench: Bench) -> None:
    for slot in (0, 1, 2):
        bench.notices.hear(bench.note(PROMPT, slot))
    bench.settle()
    late = bench.note(PROMPT, 1)
    del bench.generations[0], bench.generations[1]
    bench.notices.follow()
    bench.notices.hear(late)
    bench.settle()
    assert bench.who_has(PROMPT) == {2}


def test_the_next_instance_of_a_slot_begins_with_nothing_even_while_its_past_is_forgotten(bench: Bench) -> None:
    bench.notices.hear(bench.note(PROMPT, 0))
    bench.settle()
    bench.seconds = itertools.count(step=1.0)  # one step a turn
    bench.generations[0] = 2
    bench.notices.follow()
    bench.loop.turn()
    assert not bench.notices.is_idle
    bench.notices.follow()
    bench.settle()
    assert bench.who_has(PROMPT) == set()
    bench.notices.hear(bench.note(PROMPT, 0))
    bench.settle()
    assert bench.who_has(PROMPT) == {0}


def test_an_instance_is_known_as_soon_as_it_is_there(bench: Bench) -> None:
    bench.generations[7] = 1
    bench.notices.follow()
    bench.notices.hear(bench.note(PROMPT, 7))
    bench.settle()
    assert bench.who_has(PROMPT) == {7}


def test_the_next_scheduler_keeps_what_stands_and_forgets_who_left_meanwhile(bench: Bench) -> None:
    bench.notices.hear(bench.note(PROMPT, 0))
    bench.notices.hear(bench.note("other " + PROMPT, 1))
    bench.settle()
    del bench.generations[0]
    bench.start()
    assert (bench.who_has(PROMPT), bench.who_has("other " + PROMPT)) == (set(), {1})


def test_what_nobody_asks_for_goes_after_its_time(bench: Bench) -> None:
    bench.notices.hear(bench.note(PROMPT, 0))
    bench.settle()
    for seconds in (0.0, EVICT_S, KEEP_S):
        assert bench.who_has(PROMPT) == {0}
        bench.seconds = itertools.repeat(seconds)
        delay, age = bench.loop.timers[-1]
        assert delay == EVICT_S
        age()
        bench.settle()
    assert bench.who_has(PROMPT) == set()


def test_what_contradicts_itself_is_dropped(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.notices.hear(RoutingNotices(1, 1, [99], [1], [1], b"\x01" * 8))
    bench.settle()
    assert bench.events[SchedulerEvent.NOTICES_DROPPED] == 1
    assert "frontend 1" in caplog.text


def test_after_the_end_nothing_is_done(bench: Bench) -> None:
    bench.notices.hear(bench.note(PROMPT, 0))
    bench.notices.close()
    assert bench.loop.cancelled
    bench.notices.hear(bench.note(PROMPT, 0))
    assert len(bench.loop.ready) == 1
