"""Native engines among the members: beats, lives, and what their silence means when the scheduler itself was away."""

from __future__ import annotations

from typing import Any

import pytest

from broker import wire
from broker.scheduler.registry import GRACE_NS, SECOND_NS
from broker.table import State
from broker.types import EngineKind, Instance, LoadReport, Role
from tests.broker.scheduler.world import FakeTable, World

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
