"""What it costs that the table has changed since the last decision, as it nearly always has.

Engines that report their load fifty times a second write more rows than most frontends have requests. So a decision
begins with copying one row or some, and finds what was kept of the last one gone.

Everything is timed in turns within one process, so that a busy machine is busy for all; the cheapest block counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from broker.counters import CounterColumn
from broker.lease import take
from broker.policies.base import least
from broker.saturation import Saturation
from broker.table import Column
from broker.types import EngineKind, LoadReport, Role
from shm import seqlock
from shm.seqlock import RowReader, RowWriter
from tests.support.table import Run, instance

BLOCKS, TIMES = 40, 50
SLOTS = 1024
"""Of the table, whoever has them."""
FRONTENDS = 4

Timed = Callable[[], float]
"""One block; microseconds of one turn."""


def cheapest(ways: dict[str, Timed]) -> dict[str, float]:
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(BLOCKS):
        for name, block in ways.items():
            found[name] = min(found[name], block())
    print({name: round(us, 2) for name, us in found.items()})
    return found


class Rows:
    """A table of bare rows, and a reader of each twin."""

    def __init__(self, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
        values = np.zeros((len(Column), SLOTS), dtype=np.int64)
        sequence, cells = np.zeros(SLOTS, dtype=np.int64), memoryview(np.zeros(2, dtype=np.int64))
        self.used = used
        self.writer = RowWriter(memoryview(sequence), memoryview(values.reshape(-1)), cells[:1], cells[1:])
        for slot in range(used):
            self.writer.write(slot, {0: 1})
        reader = RowReader(sequence, values, cells[:1], cells[1:])
        self.readers = {"compiled": reader}
        monkeypatch.setattr(seqlock, "compiled", None)
        self.readers["numpy"] = RowReader(sequence, values, cells[:1], cells[1:])

    def look(self, twin: str, changed: int) -> float:
        """At a table of which so many rows have changed since the last look; the writing is not in the figure."""
        reader, taken = self.readers[twin], 0
        changes = dict.fromkeys(range(int(Column.TRUST), int(Column.TOKENS_THEN)), 7)
        reader.refresh()
        for turn in range(TIMES):
            for row in range(changed):
                self.writer.write((turn * 7 + row) % self.used, changes)
            start = time.perf_counter_ns()
            reader.refresh()
            taken += time.perf_counter_ns() - start
        return taken / TIMES / 1e3


@pytest.mark.parametrize("changed", [1, 4])
@pytest.mark.parametrize("used", [4, 8, 64, 1024])
def test_a_look_takes_a_fraction_of_numpys_calls(used: int, changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen, compiled by numpy: 0.04 to 0.07; 0.16 with 1,024 rows, whose sequences it looks through one by one."""
    if seqlock.compiled is None:
        pytest.skip("it was not compiled here")
    rows = Rows(used, monkeypatch)
    took = cheapest({twin: lambda twin=twin: rows.look(twin, changed) for twin in rows.readers})  # type: ignore[misc]
    assert took["compiled"] < took["numpy"] / 2


@pytest.mark.parametrize("by", ["requests", "load"])
@pytest.mark.parametrize("instances", [4, 16, 64, 1024])
def test_a_decision_after_reports_costs_little_more(instances: int, by: str, tmp_path: Path) -> None:
    """View, pick, lease, room and the lease's end; the reports themselves are not in the figures.

    Seen with 4 to 1,024 instances, in times of a decision with nothing changed: by live counters 1.15 to 1.4, without
    twins in C 1.6 to 2, of decisions that take three times as long themselves. By what engines report 1.9 to
    2.2 with up to 16 instances, above up to 2.8.
    """
    with Run(tmp_path, slots=SLOTS, frontends=64) as run:
        run.clock = time.monotonic_ns  # type: ignore[assignment]  # the real clock is part of the cost
        reader = run.reader = run.attach_reader()
        report = LoadReport(running=1, waiting=0, capacity=256)
        rng, rows = Random(1), [run.frontend(n) for n in range(FRONTENDS)]
        for n in range(instances):
            it = instance(f"tcp://10.0.{n // 256}.{n % 256}:8000", "model", engine=EngineKind.NATIVE)
            run.writer.admit(it, time.monotonic_ns())
            rows[n % FRONTENDS].add(CounterColumn.STARTED, n, rng.randrange(9))
            run.writer.report(n, report, time.monotonic_ns())
        saturation = Saturation(reader, 0)

        def decide() -> None:
            view = reader.view(Role.MIXED, "model")
            slot = view.listed[least(view.requests if by == "requests" else view.load, rng)]
            lease = take(reader, rows[0], slot, view.generation(slot), 100)
            assert lease is not None
            assert saturation.room(slot) > 0
            lease.close()

        def decisions(changed: int) -> float:
            taken = 0
            for turn in range(TIMES):
                for n in range(changed):
                    run.writer.report((turn * 7 + n) % instances, report, time.monotonic_ns())
                start = time.perf_counter_ns()
                decide()
                taken += time.perf_counter_ns() - start
            return taken / TIMES / 1e3

        took = cheapest({f"{n} changed": lambda n=n: decisions(n) for n in (0, 1, 4)})  # type: ignore[misc]
        assert took["1 changed"] < 4 * took["0 changed"]
