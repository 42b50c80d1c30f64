"""Asking over HTTP: what is asked of whom, and what an engine cannot do to us by its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import zmq

from broker.config import Manager
from broker.errors import Unhealthy
from broker.scheduler import collect
from broker.scheduler.collect import Collector, Errands
from broker.scheduler.fields import parse
from broker.types import EngineKind, Instance, LoadReport, Trust
from tests.broker.scheduler.fake_engine import FakeEngine, vllm
from tests.support.waiting import eventually

T = TypeVar("T")

SGLANG = {
    "/health": (200, b""),
    "/v1/models": (200, b'{"data":[{"id":"m","owned_by":"sglang"}]}'),
    "/server_info": (200, b'{"kv_events":{"load_endpoint_port_base":5600,"dp_size":2}}'),
}


def ask(question: Callable[[Collector], Awaitable[T]], **manager: float) -> T:
    """Runs one question with a collector of its own."""
    settings = Manager(health_check_timeout_secs=manager.get("timeout", 5.0), health_success_threshold=2)

    async def run() -> T:
        with zmq.Context() as context:
            async with Collector(settings, context) as collector:
                return await question(collector)

    return asyncio.run(run())


def join(engine: FakeEngine, /, **fields: object) -> Instance:
    registration = parse({"role": 0, "host_ip": "127.0.0.1", "port": engine.port, **fields}, False)
    return ask(lambda collector: collector.join(registration))


def at(engine: FakeEngine, kind: EngineKind = EngineKind.VLLM) -> Instance:
    return Instance(url=engine.url, engine=kind, metrics_url=f"{engine.url}/metrics")


def test_a_kind_that_is_said_is_not_looked_for() -> None:
    with FakeEngine({"/health": (200, b"")}) as engine:
        instance = join(engine, engine="vllm", models="m")
        assert (instance.engine, instance.models) == (EngineKind.VLLM, ("m",))
        assert set(engine.asked) == {"/health"}


def test_sglang_that_publishes_its_load_is_not_polled() -> None:
    with FakeEngine(SGLANG) as engine:
        instance = join(engine)
    assert instance.load_endpoint == "tcp://127.0.0.1:5600,tcp://127.0.0.1:5601"
    assert instance.metrics_url == ""


def test_no_answer_of_the_health_check_ends_the_probing() -> None:
    with FakeEngine({**vllm(), "/health": (503, b"")}) as engine:
        with pytest.raises(Unhealthy, match="/health"):
            join(engine)
        assert set(engine.asked) == {"/health"}


def test_a_newcomer_that_hangs_is_given_up_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "JOIN_S", 0.05)
    with FakeEngine(vllm()) as engine:
        engine.release.clear()
        registration = parse({"role": 0, "host_ip": "127.0.0.1", "port": engine.port}, False)
        with pytest.raises(Unhealthy):
            ask(lambda collector: collector.join(registration), timeout=0.05)


def test_load_by_metrics() -> None:
    with FakeEngine(vllm()) as engine:
        report = ask(lambda collector: collector.load(at(engine)))
    assert report == LoadReport(running=3, waiting=2, kv_permille=250, trust=Trust.APPROX)


@pytest.mark.parametrize("answer", [(500, b"vllm:num_requests_running 1\n"), (200, b""), (200, b"\xff\x00" * 99)])
def test_no_load_in_the_answer_is_no_report(answer: tuple[int, bytes]) -> None:
    with FakeEngine({"/metrics": answer}) as engine:
        assert ask(lambda collector: collector.load(at(engine))) is None


def test_an_endless_answer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "MAX_METRICS_BYTES", 1000)
    with FakeEngine({"/metrics": (200, b"vllm:num_requests_running 1\n" + b"x 1\n" * 1000)}) as engine:
        assert ask(lambda collector: collector.load(at(engine))) is None


def test_the_environments_proxy_is_not_for_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with FakeEngine(vllm()) as engine:
        assert ask(lambda collector: collector.is_healthy(at(engine)))


@pytest.mark.parametrize("status", [204, 301, 304, 404, 429, 500])
def test_only_200_is_healthy(status: int) -> None:
    with FakeEngine({"/health": (status, b""), "/v1/models": (200, b"{}")}) as engine:
        assert not ask(lambda collector: collector.is_healthy(at(engine)))


def test_a_server_of_unknown_make_without_a_health_endpoint_is_asked_for_its_models() -> None:
    with FakeEngine({"/v1/models": (200, b"{}")}) as engine:
        assert ask(lambda collector: collector.is_healthy(at(engine, EngineKind.OPENAI)))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://no-such-host.invalid:1", "http://[::1]:1"])
def test_nobody_there_is_not_healthy(url: str) -> None:
    assert not ask(lambda collector: collector.is_healthy(Instance(url=url)))


def test_an_errand_runs_once_per_key_and_ends_with_its_owner() -> None:
    async def run() -> list[str]:
        done: list[str] = []
        errands, go = Errands(), asyncio.Event()

        async def errand(name: str) -> None:
            await go.wait()
            done.append(name)

        errands.start("a", errand("first"))
        errands.start("a", errand("not while the first one runs"))
        errands.start("b", errand("other"))
        assert len(errands) == 2
        go.set()
        await eventually(lambda: not len(errands), what="both ended")
        go.clear()
        errands.start("a", errand("cancelled"))
        await errands.close()
        assert len(errands) == 0
        return done

    assert asyncio.run(run()) == ["first", "other"]


def test_an_errand_that_fails_is_logged_and_not_in_the_way(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        errands = Errands()

        async def fails() -> None:
            raise ValueError("boom")

        errands.start("a", fails())
        await eventually(lambda: "a" not in errands, what="ended")

    asyncio.run(run())
    assert "boom" in caplog.text
