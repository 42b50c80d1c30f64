"""What the load table costs: each operation beside the plain numpy reference, in one run.

The reference is what any choice by live counters must do at least: sum four frontends' counters over the slots and
take the smallest (`np.add.reduce` + `argmin`). A decision is view + pick + lease + its closing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from broker.counters import CounterColumn, FrontendCounters
from broker.lease import take
from broker.policies.base import least
from broker.table import Cell
from broker.types import LoadReport, Role
from tests.support.table import Run

FRONTENDS = 4
SLOTS = [8, 64, 1024, 4096]


@pytest.fixture(params=SLOTS, ids=lambda n: f"{n}slots")
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    """Four live frontends, so many instances in a table of the default size or larger, all reported and in use."""
    request.node.own_markers.append(pytest.mark.benchmark(group=f"table, {request.param} instances").mark)
    with Run(tmp_path, slots=max(1024, request.param), frontends=64) as run:
        run.clock = time.monotonic_ns  # type: ignore[assignment]  # the real clock is part of the cost
        run.reader = run.attach_reader()
        rng = Random(1)
        for n in range(request.param):
            slot = run.admit(f"http://10.0.{n // 256}.{n % 256}:8000", "model")
            run.writer.report(slot, LoadReport(running=rng.randrange(9), waiting=0), time.monotonic_ns() + 10**15)
        for row in range(FRONTENDS):
            frontend = run.frontend(row)
            for slot in range(request.param):
                frontend.add(CounterColumn.STARTED, slot, rng.randrange(9))
        yield run


def _row(run: Run) -> FrontendCounters:
    row = FrontendCounters(run.reader._counters_segment, 1)
    run.reader.view(Role.MIXED, "model")
    return row


def test_reference_add_reduce_and_argmin(benchmark: BenchmarkFixture, run: Run) -> None:
    count = len(run.reader.entries())
    window = run._counters.array("slots")[:FRONTENDS, CounterColumn.STARTED, :count]
    benchmark(lambda: np.add.reduce(window, 0).argmin())


def test_decision_by_live_counters(benchmark: BenchmarkFixture, run: Run) -> None:
    """The bar: at 8 / 64 / 1,024 instances at most 8 / 12 / 18 references."""
    reader, row, rng = run.reader, _row(run), Random(1)

    def decide() -> None:
        view = reader.view(Role.MIXED, "model")
        slot = view.listed[least(view.requests, rng)]
        lease = take(reader, row, slot, view.generation(slot), 100)
        assert lease is not None
        lease.close()

    benchmark(decide)


def test_decision_by_reported_load(benchmark: BenchmarkFixture, run: Run) -> None:
    reader, row, rng = run.reader, _row(run), Random(1)

    def decide() -> None:
        view = reader.view(Role.MIXED, "model")
        slot = int(view.slots[least(view.load, rng)])
        lease = take(reader, row, slot, view.generation(slot), 100)
        assert lease is not None
        lease.close()

    benchmark(decide)


def test_decision_after_a_report(benchmark: BenchmarkFixture, run: Run) -> None:
    """The same with a row written before each one: the snapshot is never fresh. Includes the write."""
    reader, row, rng = run.reader, _row(run), Random(1)
    report = LoadReport(running=1, waiting=0)

    def decide() -> None:
        run.writer.report(3, report, time.monotonic_ns())
        view = reader.view(Role.MIXED, "model")
        slot = int(view.slots[least(view.load, rng)])
        lease = take(reader, row, slot, view.generation(slot), 100)
        assert lease is not None
        lease.close()

    benchmark(decide)


def test_decision_while_a_row_stays_half_written(benchmark: BenchmarkFixture, run: Run) -> None:
    """The scheduler was stopped in the middle of a row: every decision looks at that row again."""
    reader, row, rng = run.reader, _row(run), Random(1)
    run.writer._rows._sequence[3] |= 1
    run.writer._cells[Cell.VERSION] += 1

    def decide() -> None:
        view = reader.view(Role.MIXED, "model")
        slot = view.listed[least(view.requests, rng)]
        lease = take(reader, row, slot, view.generation(slot), 100)
        assert lease is not None
        lease.close()

    benchmark(decide)


def test_view(benchmark: BenchmarkFixture, run: Run) -> None:
    benchmark(lambda: run.reader.view(Role.MIXED, "model"))


def test_live_counters_over_the_candidates(benchmark: BenchmarkFixture, run: Run) -> None:
    slots = run.reader.view(Role.MIXED, "model").slots
    benchmark(lambda: run.reader.live_requests(slots))


def test_take_and_close(benchmark: BenchmarkFixture, run: Run) -> None:
    reader, row = run.reader, _row(run)

    def lease() -> None:
        lease = take(reader, row, 3, 1, 100)
        assert lease is not None
        lease.close()

    benchmark(lease)


def test_row_write(benchmark: BenchmarkFixture, run: Run) -> None:
    """A load report, with the sums of the live counters at its moment."""
    report = LoadReport(running=1, waiting=0, waiting_tokens=5, kv_permille=500)
    now_ns = time.monotonic_ns()
    benchmark(lambda: run.writer.report(3, report, now_ns))


def test_snapshot_after_one_row(benchmark: BenchmarkFixture, run: Run) -> None:
    """Copying what one written row changed. Includes a write of the barest kind."""
    rows = run.reader._rows
    benchmark(lambda: (run.writer._rows.write(3, {}), rows.refresh()))


def test_snapshot_of_everything(benchmark: BenchmarkFixture, run: Run) -> None:
    rows = run.reader._rows

    def refresh() -> None:
        rows._copied[:] = -1
        rows._seen = -1
        rows.refresh()

    benchmark(refresh)


def test_sorting_the_candidates_anew(benchmark: BenchmarkFixture, run: Run) -> None:
    """After a change of membership; every blob is known already."""
    run.reader.entries()

    def select() -> None:
        run.reader._membership = -1
        run.reader.view(Role.MIXED, "model")

    benchmark(select)
