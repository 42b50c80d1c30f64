"""A scheduler that removes instances and gives their slots away as fast as the rule allows; frontends that choose from
views that are older than that.

Both sides keep a ledger by slot and generation: the frontend of the leases it got, the scheduler of the requests that
the counters show for the generation when it ends.
Allowed: a take that finds its slot changed (withdrawn, no request).
Forbidden: a request counted to another generation than that of its lease, in either direction.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import MethodType

import pytest

from broker.config import Config
from broker.counters import CounterColumn, CountersReader, FrontendCounters, attach_counters
from broker.errors import NoInstance
from broker.lease import Lease, take
from broker.table import Cell, Column, State, TableWriter
from broker.types import Role
from broker.view import TableReader
from tests.support.children import child, pipe
from tests.support.table import Run, instance

C = CounterColumn
SLOTS = 3
GENERATIONS = 300
"""At least so many, whatever the number of takes."""


@dataclass
class Ledger:
    """Requests and answers by (slot, generation)."""

    started: Counter[tuple[int, int]] = field(default_factory=Counter)
    answered: Counter[tuple[int, int]] = field(default_factory=Counter)
    withdrawn: int = 0

    def distance(self, other: Ledger) -> int:
        """Requests and answers that stand in the two ledgers under different generations."""
        return sum(
            abs(ours[key] - theirs[key])
            for ours, theirs in ((self.started, other.started), (self.answered, other.answered))
            for key in ours.keys() | theirs.keys()
        )


def _serve(path: Path, config: Config, row: int, takes: int, results: Connection, break_rule: bool) -> None:
    reader = TableReader.attach(path, config)
    if break_rule:
        reader.is_open = lambda slot, generation: True  # type: ignore[method-assign]  # the protection removed
    counters = FrontendCounters(attach_counters(path, config), row)
    rng = random.Random(row)
    ledger = Ledger()
    held: list[Lease] = []
    taken = 0
    while taken < takes or reader.snapshot[Column.GENERATION].sum() < GENERATIONS:
        try:
            view = reader.view(Role.MIXED, None)
        except NoInstance:  # all slots are just being reused
            continue
        slots = view.slots.tolist()
        for _ in range(10):  # the later ones choose from an old view
            slot = slots[rng.randrange(len(slots))]
            lease = take(reader, counters, slot, view.generation(slot), 3)
            taken += 1
            if lease is None:
                ledger.withdrawn += 1
            else:
                ledger.started[slot, lease.generation] += 1
                held.append(lease)
        keep = rng.randrange(4)
        while len(held) > keep:
            _close(held.pop(0), ledger)
    for lease in held:
        _close(lease, ledger)
    results.send(ledger)


def _close(lease: Lease, ledger: Ledger) -> None:
    ledger.answered[lease.slot, lease.generation] += 1
    lease.close(C.STATUS_200)


def _churn(path: Path, config: Config, results: Connection, break_rule: bool) -> None:
    """Remove and reuse every slot in turn until the table says stop; then end every generation."""
    writer = TableWriter.attach(path, config)
    writer.take_over()
    if break_rule:
        # The protection removed: a slot is given away whatever is in flight there.
        writer._counters.settled = MethodType(CountersReader.sums, writer._counters)  # type: ignore[method-assign]
    ledger = Ledger()
    counted = [(0, 0)] * SLOTS
    for n in range(SLOTS):
        writer.admit(instance(f"http://{n}"), 1)
    while not writer._cells[Cell.READY]:
        for slot in range(SLOTS):
            _end(writer, slot, ledger, counted)
            assert writer.admit(instance(f"http://{slot}"), 1) == slot
    results.send(None)
    results.recv()  # the frontends have closed everything
    for slot in range(SLOTS):
        _end(writer, slot, ledger, counted)
    results.send(ledger)


def _end(writer: TableWriter, slot: int, ledger: Ledger, counted: list[tuple[int, int]]) -> None:
    writer.remove(slot, 1)
    while writer.state(slot) is not State.FREE:
        writer.reclaim(1)

    def base(column: CounterColumn) -> int:
        return writer._base[column * SLOTS + slot]

    requests, answers = base(C.STARTED) - base(C.WITHDRAWN), base(C.STATUS_200)
    generation = writer._rows.load(slot, Column.GENERATION)
    ledger.started[slot, generation] += requests - counted[slot][0]
    ledger.answered[slot, generation] += answers - counted[slot][1]
    counted[slot] = requests, answers


def _run(path: Path, takes: int, *, break_taking: bool = False, break_reclaiming: bool = False) -> int:
    """Requests and answers accounted to the wrong generation."""
    with Run(path, slots=SLOTS, rest=0) as run, ExitStack() as stack:
        ours, theirs = pipe()
        scheduler = stack.enter_context(child(_churn, path, run.config, theirs, break_reclaiming))
        run.roster.enter(0)
        end, far = pipe()
        stack.enter_context(child(_serve, path, run.config, 0, takes, far, break_taking))
        got = end.recv()
        run.writer.mark_ready()
        assert ours.recv() is None
        ours.send(None)
        shown = ours.recv()
        scheduler.join()
    print(f"{takes} takes over {len(shown.started)} generations: {got.started.total()} requests,", end=" ")
    print(f"{got.withdrawn} withdrawn, {got.distance(shown)} in the wrong generation")
    assert got.withdrawn or break_taking, "no take ever found its slot changed"
    return got.distance(shown)


@pytest.mark.parametrize("takes", [20_000, pytest.param(1_000_000, marks=pytest.mark.stress)])
def test_no_request_is_accounted_to_the_wrong_generation(tmp_path: Path, takes: int) -> None:
    assert _run(tmp_path, takes) == 0


def test_without_the_look_after_taking_requests_go_astray(tmp_path: Path) -> None:
    assert _run(tmp_path, 20_000, break_taking=True) > 0


def test_without_waiting_for_the_last_request_answers_go_astray(tmp_path: Path) -> None:
    assert _run(tmp_path, 20_000, break_reclaiming=True) > 0
