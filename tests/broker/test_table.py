"""The writer's half of the load table: a slot's life, reports, and succession after a kill at any store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.counters import CounterColumn
from broker.errors import MetadataTooLarge, TableFull
from broker.table import MAX_BLOB_BYTES, UNKNOWN, Column, State, encode
from broker.table_writer import TableWriter
from broker.types import EngineKind, FastDeployFields, LoadReport, Role, Trust
from shm.segment import Segment
from tests.support.table import Run, instance


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path, slots=4) as run:
        yield run


def column(run: Run, slot: int, name: Column) -> int:
    with Segment.attach(run.path / "load") as segment:
        return int(segment.array("values")[name, slot])


def test_a_new_instance_is_ready_at_once_in_the_lowest_free_slot(run: Run) -> None:
    assert [run.admit(f"http://h:{n}") for n in range(3)] == [0, 1, 2]
    assert [(entry.slot, entry.state) for entry in run.reader.entries()] == [(n, State.READY) for n in range(3)]
    assert column(run, 1, Column.GENERATION) == 1


def test_everything_that_was_registered_is_read_back(run: Run) -> None:
    given_ = instance(
        "tcp://h:1",
        "a",
        "b",
        role=Role.DECODE,
        engine=EngineKind.NATIVE,
        capacity=7,
        incarnation=bytes(range(16)),
        transfer=bytes(range(256)) * 24,
        fastdeploy=FastDeployFields(rdma_ports=["1", "2"], tp_size=2),
    )
    slot = run.writer.admit(given_, run.clock())
    assert run.reader.entries()[0].instance == given_
    assert run.reader.instance(slot) == given_
    assert column(run, slot, Column.CAPACITY) == 7
    assert column(run, slot, Column.ROLE) == Role.DECODE


def test_metadata_fills_its_blob_to_the_last_byte_and_no_further(run: Run) -> None:
    room = MAX_BLOB_BYTES - len(encode(instance("http://h:1", transfer=b"x" * 4000))) + 4000
    run.writer.admit(instance("http://h:1", transfer=b"x" * room), run.clock())
    assert run.reader.entries()[0].instance.transfer == b"x" * room
    with pytest.raises(MetadataTooLarge, match=r"http://h:2 takes 8193 bytes"):
        run.writer.admit(instance("http://h:2", transfer=b"x" * (room + 1)), run.clock())
    with pytest.raises(MetadataTooLarge):
        run.writer.describe(0, instance("http://h:1", transfer=b"x" * (room + 1)))
    assert len(run.reader.entries()) == 1


def test_a_full_table_refuses_until_a_slot_has_rested(run: Run) -> None:
    for n in range(4):
        run.admit(f"http://h:{n}")
    with pytest.raises(TableFull, match=r"all 4 slots of the load table \(shm\.slots\) are in use$"):
        run.admit("http://h:9")
    run.writer.remove(2, run.clock())
    run.clock.advance(29.9)
    with pytest.raises(TableFull, match=r"in use, 1 of them resting \(shm\.rest-secs\)$"):
        run.admit("http://h:9")
    run.clock.advance(0.2)
    assert run.admit("http://h:9") == 2
    assert column(run, 2, Column.GENERATION) == 2


def test_a_slot_rests_from_its_last_request_on(run: Run) -> None:
    frontend = run.frontend(0)
    slot = run.admit("http://h:1")
    frontend.add(CounterColumn.STARTED, slot)
    run.writer.remove(slot, run.clock())
    assert run.reader.entries() == []
    for _ in range(5):
        assert run.writer.reclaim(run.clock.advance(60)) == []
    frontend.add(CounterColumn.FINISHED, slot)
    assert run.writer.reclaim(run.clock.advance(60)) == []
    assert run.writer.reclaim(run.clock.advance(29)) == []
    frontend.add(CounterColumn.STARTED, slot)
    assert run.writer.reclaim(run.clock.advance(0.5)) == []
    frontend.add(CounterColumn.FINISHED, slot)
    assert run.writer.reclaim(run.clock.advance(0.4)) == []
    assert run.writer.reclaim(run.clock.advance(29.9)) == []
    assert run.writer.reclaim(run.clock.advance(0.2)) == [slot]
    assert run.writer.reclaim(run.clock.advance(60)) == []
    assert run.writer.state(slot) is State.FREE


def test_a_new_generation_begins_its_counts_at_zero(run: Run) -> None:
    frontend = run.frontend(0)
    slot = run.admit("http://h:1")
    for name in (CounterColumn.STARTED, CounterColumn.FINISHED, CounterColumn.STATUS_200):
        frontend.add(name, slot, 5)
    counted = run.reader.counted(run.reader.entries()[0])
    assert counted is not None
    assert counted[CounterColumn.STARTED] == 5
    run.writer.remove(slot, run.clock())
    run.writer.reclaim(run.clock.advance(31))
    assert run.admit("http://h:2") == slot
    (entry,) = run.reader.entries()
    assert run.reader.counted(entry) == [0] * len(CounterColumn)
    frontend.add(CounterColumn.STARTED, slot)
    counted = run.reader.counted(entry)
    assert counted is not None
    assert counted[CounterColumn.STARTED] == 1
    assert counted[CounterColumn.STATUS_200] == 0


def test_states_change_among_those_that_hold_an_instance_only(run: Run) -> None:
    slot = run.admit("http://h:1")
    for state in (State.DRAINING, State.DOWN, State.READY):
        run.writer.set_state(slot, state)
        assert run.reader.entries()[0].state is state
    with pytest.raises(ValueError, match="READY to FREE"):
        run.writer.set_state(slot, State.FREE)
    with pytest.raises(ValueError, match="FREE to READY"):
        run.writer.set_state(3, State.READY)
    run.writer.remove(slot, run.clock())
    with pytest.raises(ValueError, match="nothing to remove"):
        run.writer.remove(slot, run.clock())


def test_describing_keeps_the_generation_and_the_load(run: Run) -> None:
    slot = run.admit("http://h:1", "old")
    run.writer.report(slot, LoadReport(running=3, waiting=0), run.clock())
    run.reader.entries()
    run.writer.describe(slot, instance("http://h:1", "new"))
    (entry,) = run.reader.entries()
    assert (entry.generation, entry.instance.models) == (1, ("new",))
    assert column(run, slot, Column.RUNNING) == 3


def test_a_report_is_stored_with_the_counters_of_its_moment(run: Run) -> None:
    frontend = run.frontend(0)
    slot = run.admit("http://h:1")
    frontend.add(CounterColumn.STARTED, slot, 4)
    frontend.add(CounterColumn.TOKENS_STARTED, slot, 90)
    run.writer.report(
        slot, LoadReport(running=3, waiting=1, waiting_tokens=20, kv_permille=500, capacity=8, trust=Trust.APPROX), 77
    )
    stored = {name.name: column(run, slot, name) for name in Column}
    assert (
        stored
        | {
            "RUNNING": 3,
            "WAITING": 1,
            "WAITING_TOKENS": 20,
            "KV_PERMILLE": 500,
            "CAPACITY": 8,
            "TRUST": Trust.APPROX,
            "REPORTED_NS": 77,
            "IN_FLIGHT_THEN": 4,
            "TOKENS_THEN": 90,
        }
        == stored
    )


def test_what_an_engine_did_not_say_is_unknown(run: Run) -> None:
    slot = run.writer.admit(instance("http://h:1", capacity=5), run.clock())
    run.writer.report(slot, LoadReport(), run.clock())
    for name in (Column.RUNNING, Column.WAITING, Column.WAITING_TOKENS, Column.KV_PERMILLE):
        assert column(run, slot, name) == UNKNOWN
    assert column(run, slot, Column.CAPACITY) == 5


def test_a_new_instance_inherits_no_report(run: Run) -> None:
    slot = run.admit("http://h:1")
    run.writer.report(slot, LoadReport(running=3, waiting=1), run.clock())
    run.writer.remove(slot, run.clock())
    run.writer.reclaim(run.clock.advance(31))
    assert run.admit("http://h:2") == slot
    assert column(run, slot, Column.REPORTED_NS) == 0
    assert column(run, slot, Column.RUNNING) == UNKNOWN
    assert column(run, slot, Column.TRUST) == Trust.STALE


def test_beat_and_readiness_are_seen_by_readers(run: Run) -> None:
    assert not run.reader.alive(run.clock())
    run.writer.beat(run.clock())
    assert run.reader.alive(run.clock())
    assert not run.reader.alive(run.clock.advance(3))
    assert not run.reader.ready
    run.writer.mark_ready()
    assert run.reader.ready
    run.succeed()
    assert run.reader.ready


# -- succession --------------------------------------------------------------------------------------------


def test_a_successor_finds_everything_as_it_was(run: Run) -> None:
    for n, state in enumerate((State.READY, State.DRAINING, State.DOWN)):
        slot = run.admit(f"http://h:{n}")
        if state is not State.READY:
            run.writer.set_state(slot, state)
    run.writer.report(0, LoadReport(running=3, waiting=0), run.clock())
    assert run.writer.epoch == 1
    survivors = run.succeed()
    assert [(slot, inst.url, state) for slot, inst, state in survivors] == [
        (0, "http://h:0", State.READY),
        (1, "http://h:1", State.DRAINING),
        (2, "http://h:2", State.DOWN),
    ]
    assert run.writer.epoch == run.reader.epoch == 2
    assert column(run, 0, Column.RUNNING) == 3
    assert run.admit("http://h:9") == 3


def test_a_slot_goes_on_resting_under_a_successor(run: Run) -> None:
    slot = run.admit("http://h:0")
    run.writer.remove(slot, run.clock())
    run.clock.advance(20)
    assert run.succeed() == []
    assert run.writer.reclaim(run.clock.advance(9)) == []
    assert run.writer.reclaim(run.clock.advance(2)) == [slot]


class KilledError(Exception):
    """Stands for kill -9."""


class Stores:
    """Cells that die at the n-th store among them."""

    def __init__(self, left: int) -> None:
        self.left = left

    def wrap(self, cells: memoryview) -> Any:
        stores = self

        class Cells:
            def __getitem__(self, index: Any) -> Any:
                return cells[index]

            def __len__(self) -> int:
                return len(cells)

            def __setitem__(self, index: Any, value: Any) -> None:
                if isinstance(index, slice):  # a blob: half of it, then the kill
                    half = len(value) // 2
                    stores.store(lambda: cells.__setitem__(slice(index.start, index.start + half), value[:half]))
                stores.store(lambda: cells.__setitem__(index, value))

        return Cells()

    def store(self, action: Any) -> None:
        if self.left == 0:
            raise KilledError
        self.left -= 1
        action()


def mortal(writer: TableWriter, stores: int) -> TableWriter:
    """The writer dies at its store number `stores`, counted over every cell and blob."""
    limit = Stores(stores)
    rows = writer._rows
    for holder, name in (
        (rows, "_sequence"),
        (rows, "_values"),
        (rows, "_version"),
        (rows, "_used"),
        (writer, "_cells"),
        (writer, "_base"),
        (writer, "_blobs"),
    ):
        setattr(holder, name, limit.wrap(getattr(holder, name)))
    return writer


ACTIONS = {
    "admit": lambda w, now: w.admit(instance("http://h:new", "n" * 100), now),
    "describe": lambda w, now: w.describe(0, instance("http://h:0", "d" * 100)),
    "drain": lambda w, now: w.set_state(0, State.DRAINING),
    "remove": lambda w, now: w.remove(0, now),
    "report": lambda w, now: w.report(0, LoadReport(running=9, waiting=9), now),
    "reclaim": lambda w, now: w.reclaim(now + 60_000_000_000),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_kill_at_any_store_leaves_a_table_that_a_successor_can_use(tmp_path: Path, action: str) -> None:
    """Allowed: the action is done, or not done, or its instance is gone (it registers again).
    Forbidden: a row left odd, an instance with another's or half a blob, a bystander touched, a slot lost."""
    new = instance("http://h:new", "n" * 100)
    allowed = {
        0: [instance("http://h:0", "f" * 100), instance("http://h:0", "d" * 100)],
        1: [instance("http://h:1", "bystander")],
        2: [new],
        3: [new],
    }
    outcomes = set()
    for stores in range(80):
        path = tmp_path / str(stores)
        path.mkdir()
        with Run(path, slots=4) as run:
            run.admit("http://h:0", "f" * 100)
            run.admit("http://h:1", "bystander")
            run.admit("http://h:2", "removed")
            run.writer.remove(2, run.clock())
            run.reader.entries()
            try:
                ACTIONS[action](mortal(run.writer, stores), run.clock())
                done = True
            except KilledError:
                done = False
            run.reader.entries()  # a frontend looks at the ruins
            survivors = {slot: (inst, state) for slot, inst, state in run.succeed()}
            with Segment.attach(path / "load") as segment:
                assert not (segment.array("sequence") & 1).any()
            assert survivors[1] == (allowed[1][0], State.READY)
            entries = run.reader.entries()
            assert {e.slot: (e.instance, e.state) for e in entries} == survivors
            for slot, (found, _) in survivors.items():
                assert found in allowed[slot]
            outcomes.add(tuple(sorted((slot, inst.models, state) for slot, (inst, state) in survivors.items())))
            # No slot is lost: after the rest, all that hold no instance can be used.
            run.writer.reclaim(run.clock.advance(100))
            run.writer.reclaim(run.clock.advance(100))
            for n in range(4 - len(survivors)):
                run.admit(f"http://more:{n}")
            if done:
                return
    raise AssertionError(f"the action never ended; saw {outcomes}")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(actions=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=40))
def test_any_history_leaves_reader_and_writer_of_one_mind(tmp_path_factory: Any, actions: list[Any]) -> None:
    with Run(tmp_path_factory.mktemp("h"), slots=4) as run:
        model: dict[int, tuple[str, State]] = {}
        for number, (kind, slot) in enumerate(actions):
            if kind == 0:
                try:
                    model[run.admit(f"http://h:{number:03}")] = (f"http://h:{number:03}", State.READY)
                except TableFull:
                    assert len(model) + len(run.writer._resting) == 4
            elif kind == 1 and slot in model:
                run.writer.remove(slot, run.clock())
                del model[slot]
            elif kind == 2 and slot in model:
                model[slot] = (model[slot][0], State.DOWN)
                run.writer.set_state(slot, State.DOWN)
            elif kind == 3 and slot in model:
                run.writer.describe(slot, instance(model[slot][0], f"m{number}"))
            elif kind == 4:
                run.writer.reclaim(run.clock.advance(20))
            elif kind == 5:
                survivors = {slot: (inst.url, state) for slot, inst, state in run.succeed()}
                assert survivors == model
            elif kind == 6 and slot in model:
                run.writer.report(slot, LoadReport(running=number), run.clock())
            assert {e.slot: (e.instance.url, e.state) for e in run.reader.entries()} == model


def test_four_thousand_slots_work(tmp_path: Path) -> None:
    with Run(tmp_path, slots=4096) as run:
        for n in range(4096):
            run.admit(f"http://h:{n:04}")
        view = run.reader.view(Role.MIXED, None)
        assert view.slots.tolist() == list(range(4096))
        with pytest.raises(TableFull):
            run.admit("http://h:x")
        assert len(run.succeed()) == 4096
