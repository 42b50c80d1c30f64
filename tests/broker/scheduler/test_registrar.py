"""Who is probed when, and who waits for whom; the collector is a fake that answers when it is told to."""

from __future__ import annotations

import asyncio
import json

import pytest

from broker import config
from broker.errors import Unhealthy
from broker.scheduler import registrar
from broker.scheduler.registrar import Registrar
from broker.scheduler.registration import Registration
from broker.scheduler.registry import Registry
from broker.scheduler.tally import Tally
from broker.table import SchedulerEvent
from broker.types import EngineKind, Instance
from tests.broker.scheduler.world import FakeTable


class FakeCollector:
    """Probes succeed as vLLM once `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.joining: list[str] = []
        self.healthy = True

    async def join(self, registration: Registration, *, quiet: bool = False) -> Instance:
        self.joining.append(registration.instance.url)
        await self.go.wait()
        if not self.healthy:
            raise Unhealthy("not healthy")
        return registration.joined(EngineKind.VLLM, ("found",))


class Desk:
    def __init__(self) -> None:
        self.table = FakeTable()
        self.registry = Registry(self.table, config.build({}), 0)
        self.collector = FakeCollector()
        self.tally = Tally()
        self.registrar = Registrar(self.registry, self.collector, self.tally, config.build({}))  # type: ignore[arg-type]  # a fake

    async def post(self, host: str = "a", **fields: object) -> int:
        body = {"role": 0, "host_ip": host, "port": 1, **fields}
        status, _ = await self.registrar.answer(json.dumps(body).encode())
        return status

    def models(self, host: str = "a") -> tuple[str, ...]:
        member = self.registry.get(f"http://{host}:1")
        assert member is not None
        return member.instance.models


def test_two_registrations_of_one_url_take_turns_and_the_later_one_stands() -> None:
    async def run() -> None:
        desk = Desk()
        posts = [asyncio.create_task(desk.post(models=name)) for name in ("first", "second", "third")]
        await asyncio.sleep(0)
        desk.collector.go.set()
        assert await asyncio.gather(*posts) == [200, 200, 200]
        assert desk.collector.joining == ["http://a:1"]
        assert desk.models() == ("third",)
        assert desk.table.writes == ["admit 0", "describe 0", "describe 0"]

    asyncio.run(run())


def test_the_last_registration_stands_as_a_whole_and_the_same_again_asks_nothing() -> None:
    async def run() -> None:
        desk = Desk()
        desk.collector.go.set()
        full = {"models": "named", "load_endpoint": "tcp://a:2", "capacity": 7}
        for fields in (full, full, {}, {}):
            assert await desk.post(**fields) == 200
        (member,) = desk.registry
        instance = member.instance
        assert (instance.models, instance.load_endpoint, instance.capacity) == (("found",), "", 0)
        assert desk.collector.joining == ["http://a:1"] * 2
        assert desk.table.writes == ["admit 0", "describe 0"]

    asyncio.run(run())


def test_newcomers_are_probed_side_by_side() -> None:
    async def run() -> None:
        desk = Desk()
        posts = [asyncio.create_task(desk.post(host)) for host in "abc"]
        await asyncio.sleep(0)
        assert sorted(desk.collector.joining) == ["http://a:1", "http://b:1", "http://c:1"]
        desk.collector.go.set()
        assert await asyncio.gather(*posts) == [200, 200, 200]

    asyncio.run(run())


def test_too_many_newcomers_are_told_to_come_again_and_members_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registrar, "MOST_AT_ONCE", 1)

    async def run() -> None:
        desk = Desk()
        desk.collector.go.set()
        assert await desk.post("a") == 200
        desk.collector.go.clear()
        slow = asyncio.create_task(desk.post("b"))
        await asyncio.sleep(0)
        assert await desk.post("c") == 503
        assert await desk.post("a") == 200
        desk.collector.go.set()
        assert await slow == 200

    asyncio.run(run())


def test_who_is_down_is_probed_when_it_registers_again() -> None:
    async def run() -> None:
        desk = Desk()
        desk.collector.go.set()
        await desk.post()
        member = desk.registry.get("http://a:1")
        assert member is not None
        for _ in range(3):
            desk.registry.probed(member, False, 0)
        desk.collector.healthy = False
        assert await desk.post() == 503
        assert not member.healthy
        desk.collector.healthy = True
        assert await desk.post() == 200
        assert member.healthy
        assert (desk.tally[SchedulerEvent.REGISTRATIONS], desk.tally[SchedulerEvent.REGISTRATIONS_REFUSED]) == (2, 1)

    asyncio.run(run())


def test_models_found_by_asking_are_asked_for_again_and_named_ones_are_not() -> None:
    async def run() -> None:
        desk = Desk()
        desk.collector.go.set()
        await desk.post("a")
        await desk.post("b", models="named")
        assert (desk.models("a"), desk.models("b")) == (("found",), ("named",))
        assert [member.instance.asks_models for member in desk.registry] == [True, False]

    asyncio.run(run())
