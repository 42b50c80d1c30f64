"""Who is a member, and what its health says, in virtual time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import wire
from broker.errors import TableFull
from broker.scheduler.registry import DEAD_AFTER_NS, SECOND_NS, Registry
from broker.table import State
from broker.types import FastDeployFields, Role
from tests.broker.scheduler.world import FakeTable, World

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
