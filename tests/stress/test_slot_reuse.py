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

from broker import lease as lease_module
from broker.config import Config
from broker.counters import CounterColumn, CountersReader, FrontendCounters, attach_counters
from broker.errors import NoInstance
from broker.lease import Lease, take
from broker.table import Cell, Column, State
from broker.table_writer import TableWriter
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
        if break_rule and not held:  # so that it is not left to chance; what is held would keep the slot from reuse
            while reader._live[Column.GENERATION * SLOTS + slots[0]] == view.generation(slots[0]):
                pass
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


# -- the fence ---------------------------------------------------------------------------------------------


class StoreBuffer:
    """Counter cells behind a store buffer, as an x86-64 core has one: its owner sees its own stores at once, everybody
    else when a fence drains it, or at some later time."""

    def __init__(self, cells: memoryview) -> None:
        self._cells = cells
        self._waiting: dict[int, int] = {}

    def __getitem__(self, index: int) -> int:
        found: int = self._waiting.get(index, self._cells[index])
        return found

    def __setitem__(self, index: int, value: int) -> None:
        self._waiting[index] = value

    def drain(self) -> None:
        for index, value in self._waiting.items():
            self._cells[index] = value
        self._waiting.clear()


@pytest.mark.parametrize("fenced", [True, False])
def test_the_fence_of_a_take_is_what_the_scheduler_sees_it_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fenced: bool
) -> None:
    """The one interleaving that only the fence forbids. It cannot be had by trying: a real buffer drains within less
    time than the scheduler's removal takes in Python, so the buffer here holds its stores until it must let go.
    """
    with Run(tmp_path, slots=SLOTS, rest=0) as run:
        run.admit("http://a")
        run.roster.enter(0)
        counters = FrontendCounters(attach_counters(tmp_path, run.config), 0)
        buffer = StoreBuffer(counters.cells)
        counters.cells = buffer  # type: ignore[assignment]  # as far as take uses it
        # The frontend's fence only: the scheduler's drains another core's buffer.
        monkeypatch.setattr(lease_module, "full", buffer.drain if fenced else lambda: None)
        reader = run.reader
        is_open = reader.is_open

        def is_open_then_remove(slot: int, generation: int) -> bool:
            """The frontend looks; before anything else of it is seen, the scheduler removes and reuses the slot."""
            found = is_open(slot, generation)
            run.writer.remove(0, run.clock())
            run.writer.reclaim(run.clock.advance(1))
            return found

        monkeypatch.setattr(reader, "is_open", is_open_then_remove)
        view = reader.view(Role.MIXED, None)
        lease = take(reader, counters, 0, view.generation(0))
        assert lease is not None
        buffer.drain()
        given_away = run.writer.state(0) is State.FREE
        assert given_away is not fenced
