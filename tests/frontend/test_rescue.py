"""Which requests are taken back from a full engine, and which are not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from broker.config import Scheduler
from broker.counters import CounterColumn
from broker.types import EngineKind, LoadReport
from frontend.admission import Admission
from frontend.rescue import LOOK_S, Rescuer
from tests.frontend.fakes import Client, FakeCall, Frontend
from tests.support.table import instance

FULL, IDLE = "http://10.0.0.1:80", "http://10.0.0.2:80"


class Scene:
    """A full engine to which requests were sent, and an idle one that came later."""

    def __init__(self, path: Path, kind: EngineKind = EngineKind.VLLM, rate: float = 1000.0) -> None:
        settings = Scheduler(policy="request_num", rescues_per_sec=rate)
        self.frontend = frontend = Frontend(path, scheduler=settings)
        self.run, self.time = frontend.run, frontend.time
        frontend.slots[FULL] = self.admit(FULL, kind)
        loop = cast("asyncio.AbstractEventLoop", frontend.time)
        admission = Admission(
            frontend.config, self.run.reader, frontend.dispatcher, frontend.counters, 1, loop, lambda _: False
        )
        self.rescuer = Rescuer(settings, self.run.reader, admission, frontend.forwarder, loop, self.run.clock)

    def admit(self, url: str, kind: EngineKind = EngineKind.VLLM) -> int:
        return self.run.writer.admit(instance(url, "tiny", engine=kind), self.run.clock())

    def sent(self, count: int) -> list[FakeCall]:
        """Requests, a tenth of a second apart."""
        for _ in range(count):
            self.pass_time(0.1)
            self.frontend.begin(sink=Client())
        return self.frontend.http.calls[-count:]

    def pass_time(self, seconds: float) -> None:
        self.run.clock.advance(seconds)
        self.time.now += seconds

    def says(self, url: str, running: int, waiting: int, times: int = 2) -> None:
        for _ in range(times):
            self.pass_time(0.1)
            report = LoadReport(running=running, waiting=waiting)
            self.run.writer.report(self.frontend.slots[url], report, self.run.clock())

    def idle_joins(self) -> None:
        self.frontend.slots[IDLE] = self.admit(IDLE)
        self.says(IDLE, 0, 0, 1)

    def look(self) -> list[FakeCall]:
        """What is sent because of one look."""
        before = len(self.frontend.http.calls)
        self.pass_time(LOOK_S)
        self.time.advance(0)
        return self.frontend.http.calls[before:]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    it = Scene(tmp_path)
    yield it
    it.frontend.close()


def test_the_youngest_is_taken_back_and_sent_to_the_idle_instance(scene: Scene) -> None:
    calls = scene.sent(3)
    scene.says(FULL, 1, 2)
    scene.idle_joins()
    (moved,) = scene.look()
    assert moved.instance.url == IDLE
    assert moved.request is calls[2].request
    assert [call.cancelled for call in calls] == [False, False, True]
    assert scene.frontend.in_flight == [2, 1]
    assert scene.frontend.counted(CounterColumn.RESCUED) == 1


def test_one_at_a_time_goes_to_an_idle_instance(scene: Scene) -> None:
    scene.sent(4)
    scene.says(FULL, 1, 3)
    scene.idle_joins()
    (moved,) = scene.look()
    assert scene.look() == []
    moved.answer(b"done")
    assert len(scene.look()) == 1


def test_a_request_is_moved_once(scene: Scene) -> None:
    scene.sent(1)
    scene.says(FULL, 0, 1)
    scene.idle_joins()
    assert len(scene.look()) == 1
    scene.says(IDLE, 0, 1)
    scene.says(FULL, 0, 0)
    assert scene.look() == []


def test_nothing_is_moved_that_has_a_first_byte_or_came_after_the_report(scene: Scene) -> None:
    (begun,) = scene.sent(1)
    begun.sink.start(200, [])
    begun.sink.write(b"x")
    scene.says(FULL, 1, 1)
    scene.sent(1)
    scene.idle_joins()
    assert [call.instance.url for call in scene.look()] == []


@pytest.mark.parametrize("reports", [0, 1])
def test_nothing_is_moved_from_an_engine_that_has_not_shown_that_it_is_full(scene: Scene, reports: int) -> None:
    scene.sent(2)
    scene.says(FULL, 1, 1, reports)
    scene.idle_joins()
    assert scene.look() == []


def test_nothing_is_moved_from_an_engine_that_goes_on_computing_what_is_hung_up_on(tmp_path: Path) -> None:
    scene = Scene(tmp_path, EngineKind.FASTDEPLOY)
    scene.sent(2)
    scene.says(FULL, 1, 1)
    scene.idle_joins()
    assert scene.look() == []
    scene.frontend.close()


def test_an_instance_that_says_nothing_of_itself_is_not_idle(scene: Scene) -> None:
    scene.sent(2)
    scene.says(FULL, 1, 1)
    scene.frontend.slots[IDLE] = scene.admit(IDLE)
    assert scene.look() == []


def test_not_more_than_the_rate_allows(tmp_path: Path) -> None:
    scene = Scene(tmp_path, rate=1.0)
    scene.sent(6)
    scene.says(FULL, 1, 5)
    scene.idle_joins()
    moved = 0
    for _ in range(12):  # three seconds
        for call in scene.look():
            moved += 1
            call.answer(b"done")
        scene.run.writer.report(scene.frontend.slots[FULL], LoadReport(running=1, waiting=4), scene.run.clock())
        scene.run.writer.report(scene.frontend.slots[IDLE], LoadReport(running=0, waiting=0), scene.run.clock())
    assert moved in (3, 4)
    scene.frontend.close()
