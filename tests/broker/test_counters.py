"""Counters of frontends: whose row, what sums say, and settling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from broker.counters import (
    BOUNDS_S,
    STATUSES,
    TOTALS,
    CounterColumn,
    CountersReader,
    FrontendCounters,
    Histogram,
    TotalColumn,
    attach_counters,
    histogram_column,
    outcome,
)
from shm.cells import Measures
from tests.support.table import Run

C = CounterColumn


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path) as run:
        yield run


@pytest.fixture
def reader(run: Run) -> CountersReader:
    return CountersReader(attach_counters(run.path, run.config))


def test_every_status_has_its_column_and_the_rest_share_one() -> None:
    assert {outcome(status).name for status in STATUSES} == {f"STATUS_{status}" for status in STATUSES}
    assert outcome(402) is outcome(206) is C.STATUS_OTHER


def test_sums_run_over_all_frontends_that_ever_lived(run: Run, reader: CountersReader) -> None:
    one, other = run.frontend(0), run.frontend(2)
    one.add(C.STARTED, 5)
    other.add(C.STARTED, 5, 4)
    other.add(C.FINISHED, 5, 3)
    other.add(C.TOKENS_STARTED, 5, 100)
    assert reader.rows == 3
    assert reader.in_flight(5) == (2, 100)
    assert reader.in_flight(4) == (0, 0)
    assert reader.sums(5)[:4] == [3, 5, 0, 100]
    assert reader.slots()[C.STARTED].tolist() == [0, 0, 0, 0, 0, 5] + [0] * 10
    run.roster.settle(2)
    assert reader.in_flight(5) == (1, 0)
    assert reader.sums(5)[C.ABANDONED] == 1


def test_a_frontend_writes_its_own_row_alone(run: Run, reader: CountersReader) -> None:
    frontend = run.frontend(1)
    frontend.add(C.STARTED, 15)
    frontend.count(TotalColumn.REJECTED)
    shared = attach_counters(run.path, run.config)
    assert np.argwhere(shared.array("slots")).tolist() == [[1, C.STARTED, 15]]
    assert np.argwhere(shared.array("totals")).tolist() == [[1, TotalColumn.REJECTED]]
    assert not shared.array("slots").flags.writeable


def test_settling_ends_what_a_dead_frontend_had_and_nothing_else(run: Run, reader: CountersReader) -> None:
    dead, alive = run.frontend(0), run.frontend(1)
    for frontend in (dead, alive):
        frontend.add(C.STARTED, 3, 5)
        frontend.add(C.FINISHED, 3, 2)
        frontend.add(C.TOKENS_STARTED, 3, 50)
        frontend.count(TotalColumn.CONNECTIONS_OPENED, 4)
        frontend.count(TotalColumn.CONNECTIONS_CLOSED)
        frontend.count(TotalColumn.STREAMS_OPENED, 2)
    before = reader.slots()
    assert run.roster.settle(0) == 3
    assert reader.in_flight(3) == (3, 50)
    assert (reader.slots() >= before).all()
    totals = dict(zip(TOTALS, reader.totals().tolist(), strict=True))
    assert totals["CONNECTIONS_OPENED"] - totals["CONNECTIONS_CLOSED"] == 3
    assert totals["CONNECTIONS_ABANDONED"] == 3
    assert totals["STREAMS_OPENED"] - totals["STREAMS_CLOSED"] == 2
    assert totals["STREAMS_ABANDONED"] == 2


def test_the_next_frontend_goes_on_counting_in_the_same_cells(run: Run, reader: CountersReader) -> None:
    run.frontend(0).add(C.STARTED, 0, 5)
    run.roster.settle(0)
    successor = run.frontend(0)
    successor.add(C.STARTED, 0)
    assert reader.sums(0)[C.STARTED] == 6
    assert reader.in_flight(0) == (1, 0)


def test_a_row_has_one_frontend_at_a_time_and_counts_its_lives(run: Run, reader: CountersReader) -> None:
    assert run.roster.free_row() == 0
    assert run.roster.enter(0) == 1
    run.roster.started(0, 4711)
    assert reader.live() == [(0, 4711)]
    with pytest.raises(ValueError, match="pid 4711"):
        run.roster.enter(0)
    assert run.roster.free_row() == 1
    run.roster.settle(0)
    assert reader.live() == []
    assert run.roster.enter(0) == 2
    for row in (1, 2, 3):
        run.roster.enter(row)
    assert run.roster.free_row() is None


def test_times_fall_into_the_bucket_whose_bound_they_do_not_pass(run: Run, reader: CountersReader) -> None:
    frontend = run.frontend(0)
    for seconds in (0.0, 0.005, 0.0051, 600.0, 601.0):
        frontend.observe(Histogram.DURATION, seconds)
    first = histogram_column(Histogram.DURATION)
    counts = reader.totals().tolist()[first:]
    assert counts[: len(BOUNDS_S) + 1] == [2, 1, *[0] * (len(BOUNDS_S) - 3), 1, 1]
    assert counts[len(BOUNDS_S) + 1] == 1_201_010_100
    assert TOTALS[first] == "DURATION_0.005"
    assert TOTALS[first + len(BOUNDS_S) + 1] == "DURATION_SUM_US"
    assert not any(reader.totals()[:first])


def test_level_counters_are_told_from_requests_in_flight(run: Run, reader: CountersReader) -> None:
    frontend = run.frontend(0)
    assert reader.settled(2) == [0] * len(C)
    frontend.add(C.STARTED, 2)
    assert reader.settled(2) is None
    frontend.add(C.STATUS_200, 2)
    frontend.add(C.FINISHED, 2)
    sums = reader.settled(2)
    assert sums is not None
    assert (sums[C.STARTED], sums[C.FINISHED], sums[C.STATUS_200]) == (1, 1, 1)


def test_requests_that_come_and_go_between_the_loads_are_not_all_in_flight(
    run: Run, reader: CountersReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the process sleeps between two loads: the first look shows five, the second the truth."""
    frontend = run.frontend(0)

    class Interrupted:
        def __init__(self, gauges: Measures) -> None:
            self._gauges = gauges
            self._looks = 0

        def one(self, finished: int, started: int, index: int) -> int:
            if started != C.STARTED:
                return 0
            self._looks += 1
            if self._looks > 1:
                return self._gauges.one(finished, started, index)
            ended = reader.sums(index)[finished]
            frontend.add(C.STARTED, index, 5)
            frontend.add(C.FINISHED, index, 4)
            return reader.sums(index)[started] - ended

    monkeypatch.setattr(reader, "_gauges", Interrupted(reader._gauges))
    assert reader.in_flight(3) == (1, 0)


def test_a_frontend_needs_no_more_than_a_read_only_attach(run: Run) -> None:
    run.roster.enter(3)
    FrontendCounters(attach_counters(run.path, run.config), 3).add(C.STARTED, 0)
