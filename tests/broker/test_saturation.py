"""How many more requests an instance should get: one rule, looked at case by case."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.counters import FrontendCounters
from broker.lease import take
from broker.saturation import UNLIMITED, Saturation
from broker.table import QueueColumn
from broker.types import EngineKind, LoadReport
from tests.support.table import Run, instance


class Instance:
    """One instance in a table, and what is said of it."""

    def __init__(self, path: Path, *, capacity: int = 0, native: bool = False, default: int = 0) -> None:
        self.run = Run(path)
        kind = EngineKind.NATIVE if native else EngineKind.VLLM
        self.slot = self.run.writer.admit(instance("http://h:1", capacity=capacity, engine=kind), self.run.clock())
        self.run.reader.entries()
        self._rule = Saturation(self.run.reader, default, self.run.clock)
        self._counters: FrontendCounters = self.run.frontend(0)

    def sent(self, requests: int) -> None:
        for _ in range(requests):
            assert take(self.run.reader, self._counters, self.slot, 1) is not None

    def says(self, running: int | None, waiting: int | None, kv_permille: int | None = None) -> None:
        report = LoadReport(running=running, waiting=waiting, kv_permille=kv_permille)
        self.run.writer.report(self.slot, report, self.run.clock())

    @property
    def room(self) -> int:
        self.run.reader.entries()  # looks at the table
        return self._rule.room(self.slot)

    @property
    def opening(self) -> int:
        self.run.reader.entries()
        return self._rule.opening(self.slot)


@pytest.fixture
def unknown(tmp_path: Path) -> Iterator[Instance]:
    """An HTTP engine of unknown capacity."""
    it = Instance(tmp_path)
    yield it
    it.run.__exit__()


def test_room_is_capacity_without_what_is_in_flight_and_reserved(tmp_path: Path) -> None:
    it = Instance(tmp_path, capacity=8, native=True)
    it.sent(3)
    assert it.room == it.opening == 5
    it.run.writer.queue[QueueColumn.RESERVED * it.run.writer.slots + it.slot] = 2
    assert it.room == 3


def test_a_native_engines_credit_is_not_moved_by_reports_that_are_late(tmp_path: Path) -> None:
    it = Instance(tmp_path, capacity=4, native=True)
    it.says(4, 3, 999)
    assert it.room == 4


def test_requests_of_others_take_room_at_an_http_engine(tmp_path: Path) -> None:
    it = Instance(tmp_path, capacity=8)
    it.sent(2)
    it.says(5, 1)  # four of them are somebody else's
    assert it.room == 2
    it.sent(1)
    assert it.room == 1


def test_an_engine_that_does_not_say_has_the_configured_capacity(tmp_path: Path) -> None:
    it = Instance(tmp_path, default=4)
    assert it.room == 4


def test_an_engine_of_unknown_capacity_has_room_until_it_says_otherwise(unknown: Instance) -> None:
    unknown.sent(1000)
    assert unknown.room == UNLIMITED
    unknown.says(10, 0, 949)
    assert unknown.room == UNLIMITED


def test_requests_that_wait_in_two_reports_running_show_that_it_is_full(unknown: Instance) -> None:
    unknown.sent(5)
    unknown.says(4, 1)
    assert unknown.room == UNLIMITED
    unknown.says(5, 0)
    unknown.says(4, 1)
    assert unknown.room == UNLIMITED
    unknown.says(4, 1)
    assert unknown.room <= 0
    unknown.says(5, 0)
    assert unknown.room == UNLIMITED


def test_a_full_engine_is_kept_as_full_as_it_is(tmp_path: Path) -> None:
    """Without this it would idle until its next report, and then fill up again, too far."""
    it = Instance(tmp_path)
    counters = it.run.frontend(1)
    leases = [take(it.run.reader, counters, it.slot, 1) for _ in range(25)]
    for _ in range(2):
        it.says(20, 5)
    assert it.room == -5
    for lease in leases[:6]:
        assert lease is not None
        lease.close()
    assert it.room == it.opening == 1
    it.run.__exit__()


def test_a_full_kv_cache_shows_it_at_once_whatever_the_capacity(tmp_path: Path) -> None:
    it = Instance(tmp_path, capacity=100)
    it.sent(2)
    it.says(2, 0, 950)
    assert it.room <= 0


def test_an_engine_with_nothing_to_do_is_never_full(unknown: Instance) -> None:
    unknown.says(0, 0, 1000)
    assert unknown.room == 1


def test_reports_that_are_too_old_show_nothing(unknown: Instance) -> None:
    unknown.sent(1)
    unknown.says(1, 0, 1000)
    assert unknown.room <= 0
    unknown.run.clock.advance(60)
    assert unknown.room == UNLIMITED


def test_an_engine_that_says_nothing_of_its_queue_is_not_full_by_it(unknown: Instance) -> None:
    unknown.sent(3)
    for _ in range(3):
        unknown.says(None, None)
    assert unknown.room == UNLIMITED


def test_where_no_capacity_is_known_those_in_line_get_in_step_by_step(unknown: Instance) -> None:
    unknown.sent(40)
    unknown.says(40, 0)
    assert unknown.opening == 10
    unknown.sent(7)
    assert unknown.opening == 3
    unknown.says(47, 0)
    assert unknown.opening == 11
