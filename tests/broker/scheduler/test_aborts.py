"""Ending requests wherever they are: engines are told once, every frontend is asked, silence is named."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from broker import wire
from broker.config import Config
from broker.scheduler import asking
from broker.scheduler.aborts import Aborts
from broker.scheduler.asking import Asking, Question
from broker.scheduler.collect import Answer, Collector
from broker.scheduler.registry import Registry
from broker.types import EngineKind, Instance, Role
from tests.broker.scheduler.world import FakeTable

BODY = b'{ "req_ids": ["a", "b", "c"] }'


class FakeCollector:
    def __init__(self) -> None:
        self.posts: list[tuple[str, bytes]] = []
        self.answers: dict[str, Answer | None] = {}

    async def post(self, url: str, body: bytes) -> Answer | None:
        self.posts.append((url, body))
        return self.answers.get(url.removesuffix("/v1/abort_requests"), Answer(200, b""))


class Scene:
    """Two frontends, of which each holds some requests."""

    def __init__(self) -> None:
        self.registry = Registry(FakeTable(8), Config(), 0)
        self.collector = FakeCollector()
        self.asked: list[tuple[bytes, wire.EndRequests]] = []
        self.holds: dict[bytes, list[tuple[str, int]]] = {b"f0": [], b"f1": []}
        self.gone: set[bytes] = set()
        self.silent: set[bytes] = set()
        self.asking = Asking(self.tell, lambda: [(0, 1), (1, 1)])
        self.aborts = Aborts(self.registry, cast("Collector", self.collector), self.asking)
        for row, peer in enumerate(self.holds):
            self.asking.enter((row, 1), peer)

    def add(self, url: str, engine: EngineKind, role: Role = Role.MIXED) -> None:
        self.registry.register(Instance(url=url, engine=engine, role=role), 0)

    def tell(self, peer: bytes, message: Question) -> bool:
        assert isinstance(message, wire.EndRequests)
        if peer in self.gone:
            return False
        self.asked.append((peer, message))
        if peer not in self.silent:
            ended = self.holds[peer]
            asyncio.get_running_loop().call_soon(self.asking.heard, peer, wire.Ended(message.ask, ended))
        return True

    def answer(self, body: bytes = BODY) -> tuple[int, Any]:
        status, data = asyncio.run(self.aborts.answer(body))
        return status, json.loads(data)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def entry(name: str, tokens: int) -> dict[str, object]:
    return {"request_id": name, "output_token_count": tokens}


def test_every_frontend_is_asked_and_all_they_had_is_listed(scene: Scene) -> None:
    scene.holds = {b"f0": [("a", 3)], b"f1": [("b", 0)]}
    status, said = scene.answer()
    assert status == 200
    assert said["result"]["not_found"] == ["c"]
    assert sorted(said["result"]["aborted"], key=str) == [entry("a", 3), entry("b", 0)]
    assert {(peer, *message.ids) for peer, message in scene.asked} == {(b"f0", "a", "b", "c"), (b"f1", "a", "b", "c")}
    assert not any(message.every for _, message in scene.asked)


def test_all_asks_for_all(scene: Scene) -> None:
    scene.holds[b"f1"] = [("x", 1)]
    _, said = scene.answer(b'{"abort_all": true}')
    assert said["result"] == {"aborted": [entry("x", 1)], "not_found": []}
    assert all(message.every and not message.ids for _, message in scene.asked)


def test_neither_is_refused_and_nobody_asked(scene: Scene) -> None:
    scene.add("http://f:1", EngineKind.FASTDEPLOY)
    assert scene.answer(b"{}") == (400, {"error": "must provide abort_all=true or req_ids"})
    assert (scene.collector.posts, scene.asked) == ([], [])


def test_fastdeploys_engines_get_the_body_unchanged_and_once(scene: Scene) -> None:
    scene.add("http://d:1", EngineKind.FASTDEPLOY, Role.DECODE)
    scene.add("http://p:1", EngineKind.FASTDEPLOY, Role.PREFILL)
    scene.add("http://v:1", EngineKind.VLLM)
    scene.collector.answers["http://d:1"] = Answer(
        200, b'{"result":{"aborted":[{"request_id":"a","output_token_count":9}],"not_found":["b","c"]}}'
    )
    scene.collector.answers["http://p:1"] = Answer(
        200, b'{"result":{"aborted":[{"request_id":"a","output_token_count":1}],"not_found":["b","c"]}}'
    )
    scene.holds[b"f0"] = [("a", 8), ("b", 2)]
    _, said = scene.answer()
    assert sorted(scene.collector.posts) == [
        ("http://d:1/v1/abort_requests", BODY),
        ("http://p:1/v1/abort_requests", BODY),
    ]
    assert said["result"] == {"aborted": [entry("a", 9), entry("b", 2)], "not_found": ["c"]}
    assert said["errors"] == []


def test_an_engine_that_fails_is_named_and_the_rest_goes_on(scene: Scene) -> None:
    scene.add("http://f:1", EngineKind.FASTDEPLOY)
    scene.add("http://g:1", EngineKind.FASTDEPLOY)
    scene.add("http://o:1", EngineKind.OPENAI)
    scene.collector.answers |= {
        "http://f:1": None,
        "http://g:1": Answer(500, b"oh\xff"),
        "http://o:1": Answer(404, b"{}"),
    }
    scene.holds[b"f0"] = [("a", 1)]
    _, said = scene.answer()
    assert said["result"]["aborted"] == [entry("a", 1)]
    assert {error["server"]: error["error"] for error in said["errors"]} == {
        "http://f:1": "no answer",
        "http://g:1": "status 500: oh\N{REPLACEMENT CHARACTER}",
    }


def test_a_frontend_that_is_gone_is_not_waited_for(scene: Scene) -> None:
    scene.gone = {b"f1"}
    scene.holds[b"f0"] = [("a", 1)]
    assert scene.answer()[1]["errors"] == []
    assert {peer for peer, _ in scene.asked} == {b"f0"}


def test_a_frontend_that_is_silent_is_named_in_bounded_time(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FRONTENDS_S", 0.05)
    scene.silent = {b"f1"}
    scene.holds[b"f0"] = [("a", 1)]
    _, said = scene.answer()
    assert said["result"]["aborted"] == [entry("a", 1)]
    assert [error["server"] for error in said["errors"]] == ["frontend"]


def test_long_answers_come_in_parts(scene: Scene) -> None:
    async def run() -> tuple[int, bytes]:
        scene.silent = {b"f0", b"f1"}
        answering = asyncio.create_task(scene.aborts.answer(b'{"abort_all": true}'))
        for _ in range(10):
            await asyncio.sleep(0)
        ask = scene.asked[0][1].ask
        scene.asking.heard(b"f1", wire.Ended(ask, []))
        scene.asking.heard(b"f0", wire.Ended(ask, [("a", 1)], more=True))
        assert not answering.done()
        scene.asking.heard(b"f0", wire.Ended(ask, [("b", 2)]))
        scene.asking.heard(b"f0", wire.Ended(ask, [("late", 2)]))
        return await answering

    said = json.loads(asyncio.run(run())[1])
    assert said["result"]["aborted"] == [entry("a", 1), entry("b", 2)]
