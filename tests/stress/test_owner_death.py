"""Frontends that are killed with requests in flight, settled, and replaced in the same row.

Allowed: what a dead frontend had in flight counts until its row is settled; it is then abandoned, at once and exactly.
Forbidden: in flight below zero at any look; a counter that falls; anything in flight after everybody has left or
has been settled; finished requests that were never started.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from broker.config import Config
from broker.counters import CounterColumn, CountersReader, FrontendCounters, attach_counters
from broker.lease import Lease, take
from broker.types import LoadReport, Role
from broker.view import TableReader
from shm.segment import Segment
from tests.support.children import child, kill
from tests.support.table import Run
from tests.support.waiting import until

C = CounterColumn
INSTANCES = 5


def _serve(path: Path, config: Config, row: int, seed: int) -> None:
    """Take and close leases at random until the table says stop (READY), then close the rest and leave."""
    reader = TableReader.attach(path, config)
    counters = FrontendCounters(attach_counters(path, config), row)
    rng = random.Random(seed)
    leases: list[Lease] = []
    while not reader.ready:
        view = reader.view(Role.MIXED, None)
        slot = int(view.slots[rng.randrange(len(view))])
        lease = take(reader, counters, slot, view.generation(slot), rng.randrange(1, 100))
        assert lease is not None
        leases.append(lease)
        if len(leases) > rng.randrange(1, 40):
            leases.pop(rng.randrange(len(leases))).close(C.STATUS_200)
    for lease in leases:
        lease.close()


class Watcher:
    """Looks at all counters; remembers the last look."""

    def __init__(self, reader: CountersReader) -> None:
        self._reader = reader
        self._last = reader.slots()
        self.findings: list[str] = []

    def look(self) -> None:
        now = self._reader.slots()
        if (now < self._last).any():
            self.findings.append(f"a counter fell: {C(int(np.argwhere(now < self._last)[0][0])).name}")
        for started, finished in ((C.STARTED, C.FINISHED), (C.TOKENS_STARTED, C.TOKENS_FINISHED)):
            if (now[started] < now[finished]).any():
                self.findings.append("in flight below zero")
        self._last = now


def _run(path: Path, kills: int, *, settle: bool = True, early: bool = False) -> list[str]:
    """Two frontends; one after another is killed and replaced. `early`: settled while it is only stopped."""
    rng = random.Random(kills)
    with Run(path, slots=8) as run:
        for n in range(INSTANCES):
            run.admit(f"http://{n}")
        reader = CountersReader(attach_counters(path, run.config))
        watcher = Watcher(reader)

        def busy(row: int, before: int) -> Callable[[], bool]:
            cells = run._counters.array("slots")[row, C.STARTED]
            return lambda: cells.sum() > before + 50

        def started(row: int) -> int:
            return int(run._counters.array("slots")[row, C.STARTED].sum())

        run.roster.enter(0)
        with child(_serve, path, run.config, 0, 1) as bystander:
            for number in range(kills):
                run.roster.enter(1)
                before = started(1)
                with child(_serve, path, run.config, 1, number) as victim:
                    until(busy(1, before), "the victim serves")
                    stop = time.monotonic() + rng.random() * 0.02
                    while time.monotonic() < stop:
                        watcher.look()
                    if early:
                        assert victim.pid is not None
                        os.kill(victim.pid, signal.SIGSTOP)
                        run.roster.settle(1)
                        os.kill(victim.pid, signal.SIGCONT)
                        until(busy(1, started(1)), "it goes on")
                        run.writer.mark_ready()
                        victim.join()
                        run.roster.enter(1)
                    else:
                        kill(victim)
                row = run._counters.array("slots")[1]
                owed = row[C.STARTED] - row[C.FINISHED]
                abandoned = row[C.ABANDONED].copy()
                watcher.look()
                if settle:
                    assert run.roster.settle(1) == owed.sum()
                    assert (row[C.ABANDONED] - abandoned == owed).all()
                else:
                    run.roster._roster[1, 1] = 0
                watcher.look()
                if early:
                    break
            run.writer.mark_ready()
            bystander.join()
        watcher.look()
        left = reader.slots()
        if (left[C.STARTED] != left[C.FINISHED]).any() or (left[C.TOKENS_STARTED] != left[C.TOKENS_FINISHED]).any():
            watcher.findings.append("in flight after the end")
        # A frontend killed between its last stores has counted an outcome, and not yet that it finished.
        spare = left[C.FINISHED] - left[C.ABANDONED] - left[C.STATUS_200]
        if spare.sum() < -kills:
            watcher.findings.append("more answers than requests")
        return watcher.findings


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.stress)])
def test_settling_makes_the_counters_true(tmp_path: Path, kills: int) -> None:
    assert _run(tmp_path, kills) == []


def test_without_settling_requests_stay_in_flight_for_ever(tmp_path: Path) -> None:
    assert _run(tmp_path, 2, settle=False) == ["in flight after the end"]


def test_settled_before_it_is_dead_a_frontend_finishes_twice(tmp_path: Path) -> None:
    assert "in flight below zero" in _run(tmp_path, 1, early=True)


def _look_backwards(counters: Segment) -> Callable[[], bool]:
    """The order of loads that `shm.cells` forbids; whether it shows less than nothing in flight in a thousand looks."""
    started, finished = (counters.array("slots")[:1, column, :1] for column in (C.STARTED, C.FINISHED))
    return lambda: any(int(np.subtract(started.sum(), finished.sum())) < 0 for _ in range(1000))


def _one_after_another(path: Path, config: Config) -> None:
    counters = FrontendCounters(attach_counters(path, config), 0)
    reader = TableReader.attach(path, config)
    while not reader.ready:
        lease = take(reader, counters, 0, 1)
        assert lease is not None
        lease.close()


@pytest.mark.parametrize("looks", [20_000, pytest.param(2_000_000, marks=pytest.mark.stress)])
def test_finished_is_loaded_before_started(tmp_path: Path, looks: int) -> None:
    """In the right order never below zero; in the wrong one it is, before long."""
    with Run(tmp_path) as run:
        run.admit("http://a")
        run.writer.report(0, LoadReport(), run.clock())
        run.roster.enter(0)
        counters = attach_counters(tmp_path, run.config)
        reader = CountersReader(counters)
        table = run.reader
        view = table.view(Role.MIXED, None)
        with child(_one_after_another, tmp_path, run.config) as process:
            until(lambda: reader.sums(0)[C.STARTED] > 100, "it serves")
            for _ in range(looks):
                assert table.live_requests(view.slots)[0] >= 0
            for _ in range(looks // 10):
                assert reader.in_flight(0)[0] >= 0
            until(_look_backwards(counters), "the wrong order shows less than nothing")
            run.writer.mark_ready()
            process.join()
        assert reader.in_flight(0) == (0, 0)
