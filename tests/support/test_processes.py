"""The fleet and the client, on the real thing: what every end-to-end test rests on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from tests.support.client import Client, State, chat
from tests.support.processes import Fleet
from tests.support.waiting import eventually, until


def test_a_fleet_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with Fleet(tmp_path, workers=1) as fleet:
        engine = fleet.engine("a", "--transport", "http", "--speed", "20")
        fleet.await_instances(1)

        async def ask() -> None:
            with Client(fleet.port) as client:
                streamed = await client.ask("/v1/chat/completions", chat("Hi", max_tokens=7))
                at_once = await client.ask("/v1/chat/completions", chat("Hi", stream=False, max_tokens=7))
                refused = await client.ask("/v1/chat/completions", b"no json")
            assert streamed.whole
            assert at_once.whole
            assert streamed.text() == at_once.text() != ""
            assert refused.status == 400
            assert refused.error() is not None
            assert not refused.whole

        asyncio.run(ask())
        assert len(engine.ledger()["requests"]) == 2
        pids = [process.pid for process in fleet.processes().values()]
        assert len(pids) == 3
    assert not any(map(psutil.pid_exists, pids))


def test_a_client_that_leaves_is_seen_by_the_engine(tmp_path: Path) -> None:
    with Fleet(tmp_path, workers=1) as fleet:
        engine = fleet.engine("a", "--transport", "zmq")
        fleet.await_instances(1)

        async def leave() -> None:
            with Client(fleet.port) as client:
                exchange = await client.send("/v1/chat/completions", chat("Hi", max_tokens=5000, ignore_eos=True))
                await exchange.first_byte
                assert fleet.in_flight() == 1
                exchange.leave()
                assert await exchange.ended is State.LEFT

        asyncio.run(leave())
        fleet.await_idle()
        engine.await_idle()


def test_what_is_killed_comes_back_and_what_is_frozen_stands(tmp_path: Path) -> None:
    with Fleet(tmp_path, workers=2) as fleet:
        for name in ("frontend-1", "scheduler"):
            fleet.await_replaced(name, fleet.kill(name))
        fleet.freeze("frontend-0")
        assert fleet.process("frontend-0").status() == psutil.STATUS_STOPPED
        fleet.thaw("frontend-0")
        until(lambda: fleet.get("/health")[0] == 200, "health")


def test_a_fleet_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"unknown key 'server.prot'"),
        Fleet(tmp_path, config={"server": {"prot": 1}}),
    ):
        pass


def test_waiting_ends_with_words() -> None:
    with pytest.raises(AssertionError, match=r"not within 0\.05 s: rain \(last seen: 0\)"):
        until(lambda: 0, "rain", 0.05)
    with pytest.raises(AssertionError, match="not within"):
        asyncio.run(eventually(lambda: None, lambda: "snow", 0.05))
