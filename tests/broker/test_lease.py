"""Leases: taking, finding the slot changed, and closing once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker import lease as lease_module
from broker.counters import CounterColumn, FrontendCounters
from broker.errors import NoInstance
from broker.lease import take
from broker.table import State
from broker.types import Role
from tests.support.table import Run
from tests.support.twins import twin

__all__ = ["twin"]

C = CounterColumn


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path) as run:
        run.admit("http://a")
        run.admit("http://b")
        run.reader.view(Role.MIXED, None)
        yield run


@pytest.fixture
def row(run: Run) -> FrontendCounters:
    return run.frontend(0)


def counts(run: Run, slot: int) -> dict[str, int]:
    return {C(column).name: value for column, value in enumerate(run.reader.counters.sums(slot)) if value}


def test_a_lease_counts_its_request_until_it_is_closed(run: Run, row: FrontendCounters) -> None:
    lease = take(run.reader, row, 1, 1, 30)
    assert lease is not None
    assert repr(lease) == "Lease(slot=1, generation=1, tokens=30, open)"
    assert run.reader.counters.in_flight(1) == (1, 30)
    lease.close(C.STATUS_200)
    assert repr(lease) == "Lease(slot=1, generation=1, tokens=0, closed)"
    expected = {"STARTED": 1, "FINISHED": 1, "TOKENS_STARTED": 30, "TOKENS_FINISHED": 30, "STATUS_200": 1}
    assert counts(run, 1) == expected
    lease.close(C.STATUS_500)
    lease.finish_tokens()
    assert counts(run, 1) == expected
    assert counts(run, 0) == {}


def test_prompt_tokens_may_be_released_before_the_end(run: Run, row: FrontendCounters) -> None:
    lease = take(run.reader, row, 1, 1, 30)
    assert lease is not None
    lease.finish_tokens()
    lease.finish_tokens()
    assert run.reader.counters.in_flight(1) == (1, 0)
    lease.close()
    assert run.reader.counters.in_flight(1) == (0, 0)


def test_outcomes_are_counted_while_the_lease_is_held_only(run: Run, row: FrontendCounters) -> None:
    lease = take(run.reader, row, 1, 1)
    assert lease is not None
    lease.count(C.BROKEN)
    lease.close()
    assert counts(run, 1) == {"STARTED": 1, "FINISHED": 1, "BROKEN": 1}
    with pytest.raises(ValueError, match="Lease"):
        lease.count(C.BROKEN)


def test_a_lease_ends_with_its_block(run: Run, row: FrontendCounters) -> None:
    def fail() -> None:
        lease = take(run.reader, row, 1, 1, 5)
        assert lease is not None
        with lease:
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011  # any would do
        fail()
    assert run.reader.counters.in_flight(1) == (0, 0)


def _reuse(run: Run) -> None:
    run.writer.remove(1, run.clock())
    run.writer.reclaim(run.clock.advance(31))
    assert run.admit("http://other") == 1


CHANGES: dict[str, Callable[[Run], object]] = {
    "drained": lambda run: run.writer.set_state(1, State.DRAINING),
    "down": lambda run: run.writer.set_state(1, State.DOWN),
    "removed": lambda run: run.writer.remove(1, run.clock()),
    "reused": _reuse,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_slot_that_changed_is_given_back_and_no_request_is_counted(
    run: Run, row: FrontendCounters, change: str
) -> None:
    CHANGES[change](run)
    assert take(run.reader, row, 1, 1, 30) is None
    assert run.reader.counters.in_flight(1) == (0, 0)
    assert counts(run, 1)["WITHDRAWN"] == 1
    for entry in run.reader.entries():
        counted = run.reader.counted(entry)
        assert counted is not None
        assert counted[C.STARTED] == counted[C.FINISHED] == counted[C.TOKENS_STARTED] == 0


def test_choosing_again_ends_even_if_the_snapshot_cannot_change(run: Run, row: FrontendCounters) -> None:
    """A scheduler stopped in the middle of a row: the old copy stays in the snapshot, the cells say otherwise."""
    for slot in (0, 1):
        run.writer._rows._sequence[slot] |= 1
        run.writer._rows.store(slot, 0, State.RESTING)
    tried = []
    for _ in range(2):
        view = run.reader.view(Role.MIXED, None)
        tried.append(int(view.slots[0]))
        assert take(run.reader, row, tried[-1], view.generation(tried[-1])) is None
    with pytest.raises(NoInstance):
        run.reader.view(Role.MIXED, None)
    assert sorted(tried) == [0, 1]


def test_the_order_of_stores_is_that_of_the_argument(
    run: Run, row: FrontendCounters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STARTED first, fence before the look, FINISHED last: what slot reuse rests on."""
    events: list[str] = []
    cells = row.cells

    class Recorded:
        def __getitem__(self, index: int) -> int:
            return cells[index]

        def __setitem__(self, index: int, value: int) -> None:
            events.append(C(index // row.width).name)
            cells[index] = value

        def release(self) -> None:
            cells.release()

    row.cells = Recorded()  # type: ignore[assignment]  # as far as take uses it
    is_open = run.reader.is_open
    monkeypatch.setattr(lease_module, "full", lambda: events.append("fence"))
    monkeypatch.setattr(run.reader, "is_open", lambda *a: events.append("look") or is_open(*a))
    lease = take(run.reader, row, 1, 1, 5)
    assert lease is not None
    lease.close(C.STATUS_200)
    assert events == [
        "STARTED", "TOKENS_STARTED", "fence", "look", "STATUS_200", "TOKENS_FINISHED", "FINISHED",
    ]  # fmt: skip
    run.writer.remove(1, run.clock())
    events.clear()
    assert take(run.reader, row, 1, 1, 5) is None
    assert (events[:4], events[-1]) == (["STARTED", "TOKENS_STARTED", "fence", "look"], "FINISHED")


def test_an_answer_releases_the_tokens_of_a_lease_that_counts_its_prompt(run: Run) -> None:
    counters = run.frontend(0)
    slot = run.admit("http://a:1")
    for counts_prompt, left in ((True, 0), (False, 7)):
        lease = take(run.reader, counters, slot, 1, 7)
        assert lease is not None
        lease.counts_prompt = counts_prompt
        lease.answered()
        lease.answered()
        assert run.reader.counters.in_flight(slot) == (1, left)
        lease.close()
        assert run.reader.counters.in_flight(slot) == (0, 0)
