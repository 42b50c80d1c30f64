"""The transports are told who came and who left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest

from broker.table import State
from broker.types import EngineKind, Instance
from frontend.upstream.http import HttpUpstream
from frontend.upstream.zmq import ZmqUpstream
from frontend.watch import LOOK_S, Watch
from tests.frontend.fakes import Time
from tests.support.table import Run


class Transports:
    """Both at once: what each was told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def see(self, instances: Iterable[Instance]) -> None:
        self.told.append([instance.url for instance in instances])

    def forget(self, who: object) -> None:
        self.told.append(who)


class Loop(Time):
    def call_soon(self, call: object) -> object:
        assert callable(call)
        return self.call_later(0, call)


class World:
    def __init__(self, path: Path) -> None:
        self.run = Run(path, slots=4)
        self.loop, self.http, self.native = Loop(), Transports(), Transports()
        self.watch = Watch(
            self.run.reader,
            cast("HttpUpstream", self.http),
            cast("ZmqUpstream", self.native),
            cast("asyncio.AbstractEventLoop", self.loop),
        )

    def admit(self, incarnation: bytes) -> int:
        instance = Instance(url="ipc:///e", engine=EngineKind.NATIVE, incarnation=incarnation)
        return self.run.writer.admit(instance, self.run.clock())

    def look(self) -> None:
        self.loop.advance(LOOK_S)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    it = World(tmp_path)
    yield it
    it.watch.close()
    it.run.__exit__()


def test_newcomers_are_connected_to_once(world: World) -> None:
    world.admit(b"one")
    world.look()
    world.look()
    assert world.native.told == [["ipc:///e"]]


def test_who_is_removed_is_forgotten_but_not_who_drains(world: World) -> None:
    http, native = world.run.admit("http://a"), world.admit(b"one")
    world.look()
    for slot in (http, native):
        world.run.writer.set_state(slot, State.DRAINING)
    world.look()
    assert world.http.told == []
    for slot in (http, native):
        world.run.writer.remove(slot, world.run.clock())
    world.look()
    assert (world.http.told, world.native.told[1:]) == (["http://a"], [b"one"])


def test_an_engines_next_life_is_another_instance(world: World) -> None:
    slot = world.admit(b"one")
    world.look()
    world.run.writer.describe(slot, Instance(url="ipc:///e", engine=EngineKind.NATIVE, incarnation=b"two"))
    world.look()
    assert world.native.told == [["ipc:///e"], b"one", ["ipc:///e"]]
