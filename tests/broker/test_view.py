"""The reading half of the load table: who is a candidate, and what the vectors say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.counters import CounterColumn
from broker.errors import ModelNotFound, NoInstance
from broker.lease import take
from broker.policies.base import Loads
from broker.table import UNKNOWN, Cell, Column, State
from broker.types import LoadReport, Role, Trust
from broker.view import View
from tests.support.table import Run, instance

MIXED = Role.MIXED


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path) as run:
        yield run


def urls(run: Run, view: View) -> list[str]:
    return [run.reader.instance(slot).url for slot in view.slots.tolist()]


# -- candidates --------------------------------------------------------------------------------------------


def test_candidates_are_sorted_by_url_whatever_their_slots(run: Run) -> None:
    for name in ("c", "a", "b"):
        run.admit(f"http://{name}")
    view = run.reader.view(MIXED, None)
    assert urls(run, view) == ["http://a", "http://b", "http://c"]
    assert view.slots.tolist() == [1, 2, 0]
    assert len(view) == 3
    assert [view.generation(slot) for slot in (0, 1, 2)] == [1, 1, 1]


def test_only_ready_instances_of_the_role_are_candidates(run: Run) -> None:
    for n, role in enumerate((Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE)):
        run.admit(f"http://{n}", role=role)
    run.writer.set_state(1, State.DRAINING)
    run.writer.set_state(2, State.DOWN)
    assert run.reader.view(Role.PREFILL, None).slots.tolist() == [0]
    assert run.reader.view(Role.DECODE, None).slots.tolist() == [3]
    with pytest.raises(NoInstance, match="no mixed instance is ready"):
        run.reader.view(MIXED, None)


def test_a_model_selects_those_that_name_it_else_those_that_may_serve_it(run: Run) -> None:
    run.admit("http://a", "one", "two", "two")
    run.admit("http://b", "two")
    run.admit("http://c")
    assert urls(run, run.reader.view(MIXED, "one")) == ["http://a"]
    assert urls(run, run.reader.view(MIXED, "two")) == ["http://a", "http://b"]
    assert urls(run, run.reader.view(MIXED, "other")) == ["http://c"]
    assert urls(run, run.reader.view(MIXED, None)) == ["http://a", "http://b", "http://c"]


def test_a_model_that_nobody_serves_is_not_found_only_when_all_models_are_known(run: Run) -> None:
    with pytest.raises(NoInstance):
        run.reader.view(MIXED, "other")
    run.admit("http://a", "one")
    with pytest.raises(ModelNotFound, match="`other`"):
        run.reader.view(MIXED, "other")
    run.admit("http://b")
    assert urls(run, run.reader.view(MIXED, "other")) == ["http://b"]


def test_a_model_whose_instances_are_away_is_not_called_unknown(run: Run) -> None:
    run.admit("http://a", "one")
    slot = run.admit("http://b", "two")
    run.writer.set_state(slot, State.DOWN)
    with pytest.raises(NoInstance, match="with the model 'two'"):
        run.reader.view(MIXED, "two")
    run.writer.remove(slot, run.clock())
    with pytest.raises(ModelNotFound):
        run.reader.view(MIXED, "two")


def test_any_number_of_unknown_models_costs_no_memory(run: Run) -> None:
    run.admit("http://a")
    for n in range(100):
        run.reader.view(MIXED, f"m{n}")
    assert not run.reader._groups[MIXED]._by_model


def test_avoided_slots_are_left_out_unless_nothing_else_is_left(run: Run) -> None:
    for name in ("a", "b", "c"):
        run.admit(f"http://{name}")
    assert run.reader.view(MIXED, None, avoid=[1]).slots.tolist() == [0, 2]
    assert run.reader.view(MIXED, None, avoid={0, 2, 9}).slots.tolist() == [1]
    assert run.reader.view(MIXED, None, avoid=[0, 1, 2]).slots.tolist() == [0, 1, 2]


def test_a_refused_slot_stays_out_until_the_table_changes(run: Run) -> None:
    run.admit("http://a")
    run.admit("http://b")
    run.reader.view(MIXED, None)
    run.reader.refuse(0)
    assert run.reader.view(MIXED, None).slots.tolist() == [1]
    run.reader.refuse(1)
    with pytest.raises(NoInstance):
        run.reader.view(MIXED, None)
    run.writer.report(1, LoadReport(), run.clock())
    assert run.reader.view(MIXED, None).slots.tolist() == [0, 1]


def test_a_view_is_what_policies_want(run: Run) -> None:
    run.admit("http://a")
    view: Loads = run.reader.view(MIXED, None)
    for name in ("slots", "in_flight", "tokens", "waiting", "trust", "load"):
        vector = getattr(view, name)
        assert vector.dtype == np.int64, name
        assert len(vector) == 1, name


# -- what is kept, and until when --------------------------------------------------------------------------


def test_candidates_are_kept_while_membership_stands(run: Run) -> None:
    slot = run.admit("http://a")
    first = run.reader.view(MIXED, None)
    run.writer.report(slot, LoadReport(running=1, waiting=0), run.clock())
    second = run.reader.view(MIXED, None)
    assert second.slots is first.slots
    assert second.running.tolist() == [1]
    run.admit("http://b")
    assert run.reader.view(MIXED, None).slots is not first.slots


def test_an_instance_is_decoded_once_per_description(run: Run) -> None:
    slot = run.admit("http://a")
    run.reader.view(MIXED, None)
    first = run.reader.instance(slot)
    run.admit("http://b")
    run.reader.view(MIXED, None)
    assert run.reader.instance(slot) is first
    run.writer.describe(slot, instance("http://a", "m"))
    run.reader.view(MIXED, None)
    assert run.reader.instance(slot).models == ("m",)


def _stop_in_the_row(run: Run, slot: int) -> None:
    """As a scheduler that was stopped, or killed, in the middle of writing the row."""
    run.writer._rows._sequence[slot] |= 1
    run.writer._cells[Cell.VERSION] += 1


def test_a_row_being_written_keeps_its_instance(run: Run) -> None:
    slot = run.admit("http://a")
    run.admit("http://b")
    run.reader.view(MIXED, None)
    _stop_in_the_row(run, slot)
    run.writer.set_state(1, State.DOWN)
    assert urls(run, run.reader.view(MIXED, None)) == ["http://a"]


def test_nothing_is_built_anew_while_a_row_stays_half_written(run: Run) -> None:
    """With the scheduler stopped in mid-row a decision may look again at that row, but not sort all instances."""
    slot = run.admit("http://a")
    run.admit("http://b")
    _stop_in_the_row(run, slot)
    first = run.reader.view(MIXED, None)
    assert first.slots.tolist() == [1]
    for _ in range(3):
        assert run.reader.view(MIXED, None).slots is first.slots
    run.writer.report(slot, LoadReport(), run.clock())
    assert run.reader.view(MIXED, None).slots.tolist() == [0, 1]


def test_a_blob_missed_while_it_was_written_is_read_later(run: Run) -> None:
    run.admit("http://a")
    slot = run.admit("http://b")
    decode = run.reader._read_blob

    def disturbed(found: int, generation: int, version: int) -> bytes:
        blob = decode(found, generation, version)
        if found == slot and not reports:
            reports.append(1)
            run.writer.report(slot, LoadReport(running=4, waiting=0), run.clock())
        return blob

    reports: list[int] = []
    run.reader._read_blob = disturbed  # type: ignore[method-assign]  # the writer's moment
    assert urls(run, run.reader.view(MIXED, None)) == ["http://a"]
    assert urls(run, run.reader.view(MIXED, None)) == ["http://a", "http://b"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_instance_admitted_while_membership_is_looked_at_is_not_missed(run: Run, moment: str) -> None:
    run.admit("http://a")
    run.reader.view(MIXED, None)
    cells = run.reader._cells

    class Disturbed:
        """The scheduler admits an instance just before, or after, MEMBERSHIP is loaded."""

        done = False

        def __getitem__(self, index: int) -> int:
            found = cells[index]
            if index == Cell.MEMBERSHIP and not self.done:
                self.done = True
                run.admit("http://b")
                found = cells[index] if moment == "before" else found
            return found

    run.reader._cells = Disturbed()  # type: ignore[assignment]  # as far as the reader uses it
    run.reader.view(MIXED, None)
    assert urls(run, run.reader.view(MIXED, None)) == ["http://a", "http://b"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=80)
@given(data=st.data())
def test_any_history_of_looks_ends_with_the_truth(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A reader that looks at arbitrary moments never holds on to something old once the table is at rest."""
    with Run(tmp_path_factory.mktemp("h"), slots=5) as run:
        members: dict[int, tuple[str, ...]] = {}
        for number in range(data.draw(st.integers(1, 25))):
            kind = data.draw(st.integers(0, 4))
            if kind == 0 and len(members) + len(run.writer._resting) < 5:
                models = data.draw(st.sampled_from([(), ("x",), ("y",), ("x", "y")]))
                members[run.admit(f"http://{number:02}", *models)] = models
            elif kind == 1 and members:
                slot = data.draw(st.sampled_from(sorted(members)))
                run.writer.remove(slot, run.clock())
                del members[slot]
            elif kind == 2:
                run.writer.reclaim(run.clock.advance(31))
            elif kind == 3 and members:
                run.writer.report(data.draw(st.sampled_from(sorted(members))), LoadReport(running=number), run.clock())
            if data.draw(st.booleans()):
                run.reader.entries()
        for model in (None, "x", "z"):
            named = {slot for slot, names in members.items() if model in names}
            unnamed = {slot for slot, names in members.items() if not names}
            expected = set(members) if model is None else named or unnamed
            try:
                found = set(run.reader.view(MIXED, model).slots.tolist())
            except (NoInstance, ModelNotFound):
                found = set()
            assert found == expected


# -- vectors -----------------------------------------------------------------------------------------------


def test_live_counters_are_summed_over_frontends_at_the_moment_of_the_view(run: Run) -> None:
    for name in ("b", "a"):
        run.admit(f"http://{name}")
    frontends = [run.frontend(row) for row in (0, 2)]
    for n, frontend in enumerate(frontends):
        frontend.add(CounterColumn.STARTED, 0, 3 + n)
        frontend.add(CounterColumn.FINISHED, 0, 1)
        frontend.add(CounterColumn.TOKENS_STARTED, 1, 10)
    view = run.reader.view(MIXED, None)
    assert view.in_flight.tolist() == [0, 5]
    assert view.tokens.tolist() == [20, 0]
    frontends[0].add(CounterColumn.STARTED, 1)
    assert view.in_flight.tolist() == [0, 5]
    assert run.reader.view(MIXED, None).in_flight.tolist() == [1, 5]


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_few_counters_are_summed_as_many_are(run: Run, count: int, rows: int) -> None:
    """Up to 16 of them are few."""
    for n in range(count):
        run.admit(f"http://{n:02}")
    frontends = [run.frontend(row) for row in (0, rows - 1)]
    for slot in range(count):
        frontends[slot % 2].add(CounterColumn.STARTED, slot, 3 * slot + 1)
        frontends[1].add(CounterColumn.FINISHED, slot, slot)
    view = run.reader.view(MIXED, None)
    assert view.in_flight.dtype == np.int64
    assert dict(zip(view.slots.tolist(), view.in_flight.tolist(), strict=True)) == {n: 2 * n + 1 for n in range(count)}


def test_a_frontend_that_starts_later_is_seen(run: Run) -> None:
    run.admit("http://a")
    assert run.reader.view(MIXED, None).in_flight.tolist() == [0]
    run.frontend(3).add(CounterColumn.STARTED, 0)
    assert run.reader.view(MIXED, None).in_flight.tolist() == [1]


def test_reported_numbers_are_vectors_over_the_candidates(run: Run) -> None:
    for name in ("b", "a"):
        run.admit(f"http://{name}")
    report = LoadReport(running=1, waiting=2, waiting_tokens=3, kv_permille=4, capacity=5, trust=Trust.APPROX)
    run.writer.report(0, report, run.clock())
    run.clock.advance(1)
    view = run.reader.view(MIXED, None)
    assert view.running.tolist() == [UNKNOWN, 1]
    assert view.waiting.tolist() == [UNKNOWN, 2]
    assert view.waiting_tokens.tolist() == [UNKNOWN, 3]
    assert view.kv_permille.tolist() == [UNKNOWN, 4]
    assert view.capacity.tolist() == [0, 5]
    assert view.trust.tolist() == [Trust.STALE, Trust.APPROX]
    assert view.age_ns.tolist() == [run.clock(), 1_000_000_000]


def test_shared_vectors_cannot_be_changed_by_a_policy(run: Run) -> None:
    run.admit("http://a")
    view = run.reader.view(MIXED, None)
    for vector in (view.slots, view.running, view.capacity, view.trust):
        with pytest.raises(ValueError, match="read-only"):
            vector[0] = 1


def test_load_counts_nothing_twice(run: Run) -> None:
    run.admit("http://a")
    frontend = run.frontend(0)
    frontend.add(CounterColumn.STARTED, 0, 4)
    # Four of ours are in there, and three of somebody else's.
    run.writer.report(0, LoadReport(running=5, waiting=2), run.clock())
    assert run.reader.view(MIXED, None).load.tolist() == [7]
    frontend.add(CounterColumn.STARTED, 0, 2)
    assert run.reader.view(MIXED, None).load.tolist() == [9]
    frontend.add(CounterColumn.FINISHED, 0, 5)
    assert run.reader.view(MIXED, None).load.tolist() == [4]


def test_load_is_never_negative(run: Run) -> None:
    run.admit("http://a")
    frontend = run.frontend(0)
    frontend.add(CounterColumn.STARTED, 0, 4)
    run.writer.report(0, LoadReport(running=1, waiting=0), run.clock())
    frontend.add(CounterColumn.FINISHED, 0, 4)
    assert run.reader.view(MIXED, None).load.tolist() == [0]


@pytest.mark.parametrize("report", [None, LoadReport(), LoadReport(running=9), LoadReport(waiting=9)], ids=str)
def test_unknown_load_is_the_live_counters_alone(run: Run, report: LoadReport | None) -> None:
    run.admit("http://a")
    run.frontend(0).add(CounterColumn.STARTED, 0, 2)
    if report is not None:
        run.writer.report(0, report, run.clock())
    assert run.reader.view(MIXED, None).load.tolist() == [2]


def test_a_report_stops_counting_when_it_is_too_old(run: Run) -> None:
    for name in ("a", "b"):
        run.admit(f"http://{name}")
    run.frontend(0).add(CounterColumn.STARTED, 0, 2)
    run.writer.report(0, LoadReport(running=9, waiting=0), run.clock())
    run.writer.report(1, LoadReport(running=3, waiting=0), run.clock.advance(2))
    assert run.reader.view(MIXED, None).load.tolist() == [9, 3]
    run.clock.advance(3 - 1e-6)
    assert run.reader.view(MIXED, None).load.tolist() == [9, 3]
    run.clock.advance(1e-6)
    view = run.reader.view(MIXED, None)
    assert view.load.tolist() == [2, 3]
    assert view.trust.tolist() == [Trust.STALE, Trust.EXACT]
    run.clock.advance(2)
    view = run.reader.view(MIXED, None)
    assert view.load.tolist() == [2, 0]
    assert view.trust.tolist() == [Trust.STALE, Trust.STALE]
    run.clock.advance(1000)
    assert run.reader.view(MIXED, None).load.tolist() == [2, 0]


def test_the_oldest_fresh_report_bounds_what_is_kept(run: Run) -> None:
    """What is kept until the oldest report is too old is kept for different candidates apart."""
    for n, name in enumerate(("a", "b")):
        run.admit(f"http://{name}", name)
        run.writer.report(n, LoadReport(running=5 + n, waiting=0), run.clock.advance(1))
    assert run.reader.view(MIXED, "a").load.tolist() == [5]
    assert run.reader.view(MIXED, "b").load.tolist() == [6]
    run.clock.advance(4.5)
    assert run.reader.view(MIXED, "a").load.tolist() == [0]
    assert run.reader.view(MIXED, "b").load.tolist() == [6]


def test_a_view_remembers_what_was_looked_at_as_it_was_then(run: Run) -> None:
    slot = run.admit("http://a")
    run.writer.report(slot, LoadReport(running=3, waiting=1), run.clock())
    counters = run.frontend(0)
    unseen, seen = run.reader.view(MIXED, None), run.reader.view(MIXED, None)
    assert seen.load.tolist() == [4]
    reported_ns = run.clock()
    run.clock.advance(1.0)
    run.writer.report(slot, LoadReport(running=9, waiting=9), run.clock())
    assert take(run.reader, counters, slot, 1, 5) is not None
    assert run.reader.view(MIXED, None).load.tolist() == [19]
    told = seen.seen
    shown = [None if vector is None else vector.tolist() for vector in told[2:7]]
    assert shown == [[0], None, [3], [1], [reported_ns]]
    assert told.now_ns == reported_ns
    assert unseen.seen[2:-1] == (None,) * 5


def test_columns_fit_the_matrix(run: Run) -> None:
    assert run.reader.snapshot.shape[0] == len(Column) == max(Column) + 1
