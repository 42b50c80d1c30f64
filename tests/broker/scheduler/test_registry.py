"""Who is a member, and what its health says, in virtual time."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import config, wire
from broker.config import Config
from broker.errors import TableFull
from broker.scheduler.registry import DEAD_AFTER_NS, GRACE_NS, SECOND_NS, Registry
from broker.table import State
from broker.types import EngineKind, FastDeployFields, Instance, LoadReport, Role

SETTINGS = config.build(
    {
        "manager": {
            "health-failure-threshold": 3,
            "health-success-threshold": 2,
            "health-check-interval-secs": 5,
            "health-check-timeout-secs": 5,
            "expire-after-secs": 600,
        }
    }
)
BEAT_NS = SECOND_NS // 4


class FakeTable:
    """The table as the registry sees it; keeps what was written, in order."""

    def __init__(self, slots: int = 4) -> None:
        self.epoch = 0
        self.rows: dict[int, tuple[Instance, State]] = {}
        self.writes: list[str] = []
        self.reports: dict[int, LoadReport] = {}
        self._free = list(range(slots))

    def take_over(self) -> list[tuple[int, Instance, State]]:
        self.epoch += 1
        return [(slot, instance, state) for slot, (instance, state) in sorted(self.rows.items())]

    def admit(self, instance: Instance, now_ns: int) -> int:
        if not self._free:
            raise TableFull("full")
        slot = self._free.pop(0)
        self.rows[slot] = instance, State.READY
        self.writes.append(f"admit {slot}")
        return slot

    def describe(self, slot: int, instance: Instance) -> None:
        self.rows[slot] = instance, self.rows[slot][1]
        self.writes.append(f"describe {slot}")

    def set_state(self, slot: int, state: State) -> None:
        self.rows[slot] = self.rows[slot][0], state
        self.writes.append(f"{state.name} {slot}")

    def report(self, slot: int, report: LoadReport, now_ns: int) -> None:
        assert slot in self.rows
        self.reports[slot] = report

    def remove(self, slot: int, now_ns: int) -> None:
        del self.rows[slot]
        self.writes.append(f"remove {slot}")


class World:
    """A registry, its table, and the clock."""

    def __init__(self, settings: Config = SETTINGS, table: FakeTable | None = None) -> None:
        self.now = 1000 * SECOND_NS
        self.table = table or FakeTable()
        self.settings = settings
        self.registry = Registry(self.table, settings, self.now)

    def http(self, host: str = "a", **fields: Any) -> Instance:
        instance = Instance(url=f"http://{host}:1", engine=EngineKind.VLLM, **fields)
        self.registry.register(instance, self.now)
        return instance

    def hello(self, incarnation: bytes = b"1" * 16, host: str = "n", **changes: Any) -> wire.SchedulerToEngine:
        hello = wire.EngineHello(wire.PROTOCOL, incarnation, f"tcp://{host}:1", Role.MIXED, ["m"], 4)
        return self.registry.hello(msgspec.structs.replace(hello, **changes), self.now)

    def beat(self, incarnation: bytes = b"1" * 16, capacity: int = 4, ready: bool = True) -> wire.SchedulerToEngine:
        return self.registry.beat(wire.EngineBeat(incarnation, capacity, ready), self.now)

    def probe(self, url: str, *outcomes: bool) -> None:
        for ok in outcomes:
            member = self.registry.get(url)
            assert member is not None
            self.registry.probed(member, ok, self.now)

    def live(self, seconds: float, *beating: bytes) -> None:
        """Time passes tick by tick; the engines named beat twice a second."""
        end = self.now + int(seconds * SECOND_NS)
        while self.now < end:
            self.now = min(self.now + BEAT_NS, end)
            for incarnation in beating:
                self.beat(incarnation)
            self.registry.tick(self.now)

    def state(self, url: str) -> State | None:
        member = self.registry.get(url)
        if member is None:
            return None
        assert self.table.rows[member.slot] == (member.instance, member.state)
        return member.state


# -- registration ------------------------------------------------------------------------------------------------


def test_a_new_instance_is_ready_at_once() -> None:
    world = World()
    world.http()
    assert world.state("http://a:1") is State.READY


def test_repeating_a_registration_writes_nothing() -> None:
    world = World()
    world.http()
    world.hello()
    changes = world.registry.changes
    world.table.writes.clear()
    for _ in range(10):
        world.http()
        world.hello()
        world.beat()
    assert (world.table.writes, world.registry.changes) == ([], changes)


def test_a_changed_registration_rewrites_the_metadata_of_the_same_slot() -> None:
    world = World()
    world.http()
    world.http(models=("new",))
    assert world.table.writes == ["admit 0", "describe 0"]
    assert world.table.rows[0][0].models == ("new",)


def test_a_full_table_leaves_who_is_there() -> None:
    world = World(table=FakeTable(slots=1))
    world.http("a")
    with pytest.raises(TableFull):
        world.http("b")
    assert world.state("http://a:1") is State.READY
    assert world.hello() == wire.Refused("full")


# -- health of HTTP engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([False], State.READY),
        ([False, False], State.READY),
        ([False, False, True, False, False], State.READY),
        ([False, False, False], State.DOWN),
        ([False, False, False, True], State.DOWN),
        ([False, False, False, True, False, True], State.DOWN),
        ([False, False, False, True, True], State.READY),
        ([False, False, False, True, True, False, False], State.READY),
    ],
)
def test_health_has_hysteresis(outcomes: list[bool], state: State) -> None:
    world = World()
    world.http()
    world.probe("http://a:1", *outcomes)
    assert world.state("http://a:1") is state


def test_registering_again_brings_back_at_once() -> None:
    world = World()
    world.http()
    world.probe("http://a:1", False, False, False)
    world.http()
    assert world.state("http://a:1") is State.READY


def test_an_instance_in_doubt_is_probed_more_often() -> None:
    world = World()
    world.http("a")
    world.http("b")
    world.now += 5 * SECOND_NS
    assert len(world.registry.due(world.now)) == 2
    world.probe("http://a:1", True)
    world.probe("http://b:1", False)
    world.now += SECOND_NS
    assert [member.instance.url for member in world.registry.due(world.now)] == ["http://b:1"]
    assert world.registry.due(world.now) == []


def test_an_answer_for_an_instance_that_left_changes_nothing() -> None:
    world = World()
    world.hello(b"1" * 16)
    member = world.registry.get("tcp://n:1")
    assert member is not None
    world.hello(b"2" * 16)
    assert not world.registry.probed(member, False, world.now)
    assert world.state("tcp://n:1") is State.READY


def test_who_stays_unhealthy_is_forgotten() -> None:
    world = World()
    world.http("a")
    world.http("b")
    world.probe("http://a:1", False, False, False)
    world.live(599)
    assert world.state("http://a:1") is State.DOWN
    world.live(2)
    assert world.state("http://a:1") is None
    assert world.state("http://b:1") is State.READY


# -- draining ----------------------------------------------------------------------------------------------------


def test_draining_stays_until_resume() -> None:
    world = World()
    world.http()
    world.registry.drain("http://a:1", resume=False)
    assert world.state("http://a:1") is State.DRAINING
    world.probe("http://a:1", False, False, False, True, True)
    world.http()
    assert world.state("http://a:1") is State.DRAINING
    world.registry.drain("http://a:1", resume=True)
    assert world.state("http://a:1") is State.READY


def test_who_fell_ill_while_draining_is_down_after_resume() -> None:
    world = World()
    world.http()
    world.registry.drain("http://a:1", resume=False)
    world.probe("http://a:1", False, False, False)
    world.registry.drain("http://a:1", resume=True)
    assert world.state("http://a:1") is State.DOWN


def paused(world: World, host: str, is_paused: bool = True) -> State | None:
    world.http(host, fastdeploy=FastDeployFields(is_paused=is_paused))
    return world.state(f"http://{host}:1")


def test_who_is_paused_rests_while_another_serves() -> None:
    world = World()
    assert paused(world, "a") is State.READY  # alone: requests wait inside until it is resumed
    world.http("b")
    assert world.state("http://a:1") is State.DRAINING
    assert paused(world, "a", is_paused=False) is State.READY
    assert paused(world, "a") is State.DRAINING
    for change in ("down", "drained", "gone"):
        if change == "down":
            world.probe("http://b:1", False, False, False)
        elif change == "drained":
            world.registry.drain("http://b:1", resume=False)
        else:
            world.registry.leave("http://b:1", world.now)
        assert world.state("http://a:1") is State.READY
        world.registry.drain("http://b:1", resume=True)
        world.http("b")
        assert world.state("http://a:1") is State.DRAINING


def test_others_of_another_kind_do_not_serve_in_the_place_of_who_is_paused() -> None:
    world = World()
    world.http("b", models=("other",))
    world.http("c", role=Role.DECODE)
    assert paused(world, "a") is State.READY


def test_who_rests_when_the_scheduler_dies_wakes_up_when_it_is_resumed() -> None:
    world = World()
    world.http("b")
    assert paused(world, "a") is State.DRAINING
    world = World(table=world.table)
    assert world.state("http://a:1") is State.DRAINING
    assert paused(world, "a", is_paused=False) is State.READY


def test_who_rests_and_falls_ill_is_down() -> None:
    world = World()
    world.http("b")
    paused(world, "a")
    world.probe("http://a:1", False, False, False)
    assert world.state("http://a:1") is State.DOWN
    world.probe("http://a:1", True, True)
    assert world.state("http://a:1") is State.DRAINING


@pytest.mark.parametrize("url", ["http://a:1", "http://a:1/", "HTTP://A:1"])
def test_a_person_may_write_the_url_in_other_ways(url: str) -> None:
    world = World()
    world.http()
    assert world.registry.drain(url, resume=False) is world.registry.get("http://a:1")


def test_draining_somebody_unknown_is_said() -> None:
    assert World().registry.drain("http://x:1", resume=False) is None


# -- native engines ----------------------------------------------------------------------------------------------


def test_a_silent_native_engine_is_down_within_three_seconds_and_back_with_its_next_beat() -> None:
    world = World()
    world.hello()
    world.live(10, b"1" * 16)
    assert world.state("tcp://n:1") is State.READY
    world.live(wire.DEAD_AFTER_S)
    assert world.state("tcp://n:1") is State.READY
    world.live(0.5)
    assert world.state("tcp://n:1") is State.DOWN
    assert world.beat() == wire.SchedulerBeat(1)
    assert world.state("tcp://n:1") is State.READY


def test_a_native_engine_that_is_not_ready_gets_nothing_and_is_not_forgotten() -> None:
    world = World()
    world.hello()
    world.beat(ready=False)
    assert world.state("tcp://n:1") is State.DOWN
    world.hello()
    assert world.state("tcp://n:1") is State.DOWN
    for _ in range(700):
        world.now += SECOND_NS
        world.beat(ready=False)
        world.registry.tick(world.now)
    assert world.state("tcp://n:1") is State.DOWN
    world.beat()
    assert world.state("tcp://n:1") is State.READY


def test_a_beat_renews_the_credit() -> None:
    world = World()
    world.hello()
    world.beat(capacity=9)
    assert world.table.rows[0][0].capacity == 9
    world.beat(capacity=-5)
    assert world.table.rows[0][0].capacity == 9


def test_a_beat_of_an_unknown_incarnation_is_asked_to_say_hello() -> None:
    assert World().beat(b"x" * 16) == wire.HelloAgain()


def test_a_new_incarnation_at_the_same_endpoint_is_another_instance() -> None:
    world = World()
    world.hello(b"1" * 16)
    world.hello(b"2" * 16)
    assert world.table.writes == ["admit 0", "remove 0", "admit 1"]
    assert world.registry.native_load(b"2" * 16, LoadReport(running=1), world.now)
    assert not world.registry.native_load(b"1" * 16, LoadReport(running=9), world.now)
    assert world.table.reports == {1: LoadReport(running=1)}


def test_a_replaced_incarnation_cannot_come_back() -> None:
    world = World()
    world.hello(b"1" * 16)
    world.hello(b"2" * 16)
    assert isinstance(world.hello(b"1" * 16), wire.Refused)
    assert world.beat(b"1" * 16) == wire.SchedulerBeat(1)
    member = world.registry.get("tcp://n:1")
    assert member is not None
    assert member.instance.incarnation == b"2" * 16


def test_an_engine_that_moves_takes_its_new_endpoint() -> None:
    world = World()
    world.hello(host="old")
    assert world.hello(host="new") == wire.Accepted(wire.PROTOCOL, 1)
    assert (world.state("tcp://old:1"), world.state("tcp://new:1")) == (None, State.READY)


def test_goodbye_takes_out_and_a_late_beat_does_not_bring_back() -> None:
    world = World()
    world.hello()
    assert world.registry.goodbye(b"1" * 16, world.now)
    assert world.beat() == wire.SchedulerBeat(1)
    assert world.state("tcp://n:1") is None
    assert not world.registry.goodbye(b"1" * 16, world.now)
    assert world.hello() == wire.Accepted(wire.PROTOCOL, 1)
    assert world.state("tcp://n:1") is State.READY


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": 99}, "protocol"),
        ({"endpoint": "http://h:1"}, "endpoint"),
        ({"role": Role.PREFILL}, "role"),
        ({"incarnation": b""}, "incarnation"),
    ],
)
def test_a_bad_hello_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    world = World()
    incarnation = changes.pop("incarnation", b"1" * 16)
    verdict = world.hello(incarnation, **changes)
    assert isinstance(verdict, wire.Refused)
    assert reason in verdict.reason
    assert world.table.writes == []


def test_a_native_engine_that_never_beats_lives_by_its_probes() -> None:
    world = World()
    world.registry.register(Instance(url="tcp://n:1", engine=EngineKind.NATIVE, incarnation=b"1" * 16), world.now)
    for _ in range(20):
        world.live(5)
        for member in world.registry.due(world.now):
            world.registry.probed(member, True, world.now)
    assert world.state("tcp://n:1") is State.READY
    world.live(60)
    assert world.state("tcp://n:1") is State.DOWN


def test_a_native_engine_that_beats_is_not_probed() -> None:
    world = World()
    world.hello()
    world.live(20, b"1" * 16)
    assert world.registry.due(world.now) == []


# -- the scheduler's own absences --------------------------------------------------------------------------------


def test_a_successor_finds_everybody_as_they_were() -> None:
    world = World()
    world.http("a")
    world.http("b")
    world.http("c")
    world.probe("http://b:1", False, False, False)
    world.registry.drain("http://c:1", resume=False)
    world.hello()
    successor = World(table=world.table)
    assert [successor.state(u) for u in ("http://a:1", "http://b:1", "http://c:1", "tcp://n:1")] == [
        State.READY,
        State.DOWN,
        State.DRAINING,
        State.READY,
    ]
    assert successor.beat() == wire.SchedulerBeat(2)


def test_native_engines_get_a_grace_after_a_takeover() -> None:
    world = World()
    world.hello()
    successor = World(table=world.table)
    successor.live(GRACE_NS / SECOND_NS)
    assert successor.state("tcp://n:1") is State.READY
    successor.live(0.5)
    assert successor.state("tcp://n:1") is State.DOWN


def test_a_scheduler_that_stood_still_blames_nobody() -> None:
    world = World()
    world.hello()
    world.live(5, b"1" * 16)
    world.now += 10 * SECOND_NS  # SIGSTOP and SIGCONT; the beats lie unread
    assert world.registry.tick(world.now) == []
    assert world.state("tcp://n:1") is State.READY
    world.live(2)
    assert world.state("tcp://n:1") is State.READY


def test_load_of_somebody_unknown_is_not_written() -> None:
    world = World()
    assert not world.registry.load("http://x:1", LoadReport(running=1), world.now)
    assert world.table.reports == {}


def test_ended_incarnations_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.scheduler.registry.REMEMBERED", 2)
    world = World(table=FakeTable(slots=100))
    for number in range(6):
        world.hello(bytes([number]) * 16)
    assert world.beat(bytes([0]) * 16) == wire.HelloAgain()
    assert world.beat(bytes([4]) * 16) == wire.SchedulerBeat(1)


# -- whatever happens --------------------------------------------------------------------------------------------

HOSTS = st.sampled_from("ab")
INCARNATIONS = st.sampled_from([b"1" * 16, b"2" * 16, b"3" * 16])
STEPS = st.one_of(
    st.tuples(st.just("http"), HOSTS),
    st.tuples(st.just("hello"), INCARNATIONS, HOSTS),
    st.tuples(st.just("beat"), INCARNATIONS, st.integers(-1, 9), st.booleans()),
    st.tuples(st.just("goodbye"), INCARNATIONS),
    st.tuples(st.just("drain"), HOSTS, st.booleans()),
    st.tuples(st.just("probe"), st.booleans()),
    st.tuples(st.just("live"), st.sampled_from([0.5, 3.0, 30.0, 700.0])),
    st.tuples(st.just("succeed")),
)


@given(st.lists(STEPS, max_size=40))
def test_the_table_always_says_what_the_registry_thinks(steps: list[tuple[Any, ...]]) -> None:
    world = World(table=FakeTable(slots=100))
    for step in steps:
        match step:
            case ("http", host):
                world.http(host)
            case ("hello", incarnation, host):
                world.hello(incarnation, host)
            case ("beat", incarnation, capacity, ready):
                world.beat(incarnation, capacity, ready)
            case ("goodbye", incarnation):
                world.registry.goodbye(incarnation, world.now)
            case ("drain", host, resume):
                world.registry.drain(f"http://{host}:1", resume)
            case ("probe", ok):
                for member in world.registry.due(world.now):
                    world.registry.probed(member, ok, world.now)
            case ("live", seconds):
                world.now += int(seconds * SECOND_NS) - DEAD_AFTER_NS if seconds > 100 else 0
                world.live(min(seconds, 3.0))
            case ("succeed",):
                world.registry = Registry(world.table, world.settings, world.now)
        members = list(world.registry)
        assert {m.slot: (m.instance, m.state) for m in members} == world.table.rows
        native = [m.instance.incarnation for m in members if m.instance.is_native]
        assert len(native) == len(set(native))
