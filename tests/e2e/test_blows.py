"""kill -9 of a frontend, the scheduler and an engine, each under streams: who loses what, and that nothing else does.

The client never retries. Its ledger (id -> bytes) is compared with the engines'.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from broker import config
from broker.counters import CounterColumn, CountersReader, attach_counters
from tests.support.client import Client, Exchange, State, chat
from tests.support.processes import Fleet
from tests.support.waiting import PATIENCE_S

ENGINES = {"http": "http", "zmq": "zmq", "zmq-2": "zmq"}
CONFIG = {"manager": {"health-check-interval-secs": 0.5}}
"""A killed HTTP engine is known to be down after three checks: 1.5 s instead of 15."""
STREAMS, LATE = 24, 9
WORDS = 150
"""Of an answer: 1.8 s at the engine's 12 ms a step."""
SLOW = 6
"""Times that, until the blow has fallen: however busy the machine, every stream is under way then."""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(tmp_path, workers=2, config=CONFIG) as fleet:
        for name in ENGINES:
            start(fleet, name, ENGINES[name])
        fleet.await_instances(len(ENGINES))
        yield fleet


def start(fleet: Fleet, name: str, transport: str) -> None:
    """An engine that is registered once: one over HTTP by a request, as nobody would repeat it."""
    if transport == "http":
        fleet.register(fleet.engine(name, "--transport", transport, "--router", ""))
    else:
        fleet.engine(name, "--transport", transport)


class Blow(NamedTuple):
    """What was under way when a process was killed, and the pid that it had."""

    begun: list[Exchange]
    late: list[Exchange]
    pid: int


async def strike(fleet: Fleet, client: Client, name: str) -> Blow:
    """Kills `name` with `STREAMS` streams begun and `LATE` requests that wait for their first byte; all have ended."""
    slow(fleet, SLOW)
    begun = [
        await client.send(
            "/v1/chat/completions", chat(f"{name} {k}", max_tokens=WORDS, ignore_eos=True), id=f"{name}-begun-{k}"
        )
        for k in range(STREAMS)
    ]
    await asyncio.wait_for(asyncio.gather(*(exchange.first_byte for exchange in begun)), PATIENCE_S)
    # 4,000 words are 0.4 s of prefill before the first byte, and SLOW times that.
    late = [
        await client.send(
            "/v1/chat/completions", chat(f"{name} {k} " + "word " * 4000, max_tokens=8), id=f"{name}-late-{k}"
        )
        for k in range(LATE)
    ]
    pid = fleet.kill(name)
    assert sum(exchange.state is State.OPEN for exchange in begun) >= 20
    slow(fleet, 1)
    await asyncio.wait_for(asyncio.gather(*(exchange.ended for exchange in begun + late)), PATIENCE_S)
    return Blow(begun, late, pid)


def slow(fleet: Fleet, times: float) -> None:
    for engine in fleet.engines.values():
        engine.fault(slow=times)


def compare(fleet: Fleet, client: Client) -> None:
    """Every whole answer was given by exactly one engine, with as many bytes as the client has.

    A killed engine took its ledger with it; of what it had answered only the client knows.
    """
    given: dict[str, list[int]] = {}
    for engine in fleet.engines.values():
        for entry in engine.ledger()["requests"]:
            if entry["state"] == "finished":
                given.setdefault(entry["id"], []).append(entry["bytes"])
    for id, exchange in client.ledger.items():
        if not exchange.whole:
            # The engine may have finished what a killed frontend did not deliver.
            assert id not in given or exchange.state is State.BROKEN, id
        elif exchange.fingerprint() in fleet.engines:
            assert given.get(id) == [len(exchange.body)], id
        else:
            assert id not in given, id


def calm(fleet: Fleet) -> None:
    """Counters at exactly 0, engines idle, every instance there."""
    fleet.await_idle()
    for engine in fleet.engines.values():
        engine.await_idle()
    fleet.await_instances(len(ENGINES))


async def even(fleet: Fleet, client: Client, round: str) -> None:
    """Held requests are level again over the instances."""
    slow(fleet, SLOW)  # none ends before all are there
    body = {"max_tokens": 60, "ignore_eos": True}
    held = [
        await client.send("/v1/chat/completions", chat(f"{round} {k}", **body), id=f"{round}-{k}") for k in range(30)
    ]
    await asyncio.wait_for(asyncio.gather(*(exchange.first_byte for exchange in held)), PATIENCE_S)
    slow(fleet, 1)
    await asyncio.wait_for(asyncio.gather(*(exchange.ended for exchange in held)), PATIENCE_S)
    assert all(exchange.whole for exchange in held), held
    names = Counter(exchange.fingerprint() for exchange in held)
    assert set(names) == set(fleet.engines), names
    assert max(names.values()) <= 15, names


def abandoned(fleet: Fleet) -> int:
    settings = config.parse((fleet.run_dir / "config.json").read_bytes())
    segment = attach_counters(fleet.run_dir, settings)
    count = int(CountersReader(segment).slots()[CounterColumn.ABANDONED].sum())
    segment.close()
    return count


def test_a_killed_frontend_takes_its_own_streams_and_nothing_else(fleet: Fleet) -> None:
    async def run() -> None:
        with Client(fleet.port) as client:
            blow = await strike(fleet, client, "frontend-1")
            fleet.await_replaced("frontend-1", blow.pid)
            lost = [exchange for exchange in blow.begun + blow.late if not exchange.whole]
            assert lost, "the killed frontend had no stream"
            assert all(exchange.state is State.BROKEN for exchange in lost), lost
            calm(fleet)
            # A late request may have died with the connection, before the frontend had read it and taken a lease.
            assert sum(exchange in lost for exchange in blow.begun) <= abandoned(fleet) <= len(lost)
            compare(fleet, client)
            await even(fleet, client, "after")

    asyncio.run(run())


def test_without_settling_the_dead_ones_requests_would_stay_in_flight(tmp_path: Path) -> None:
    """The protection switched off."""
    with Fleet(tmp_path, workers=2, config=CONFIG, instead={"supervisor": "tests.support.standins.unsettled"}) as fleet:
        for name in ENGINES:
            start(fleet, name, ENGINES[name])
        fleet.await_instances(len(ENGINES))

        async def run() -> None:
            with Client(fleet.port) as client:
                blow = await strike(fleet, client, "frontend-1")
                fleet.await_replaced("frontend-1", blow.pid)

        asyncio.run(run())
        for engine in fleet.engines.values():
            engine.await_idle()
        with pytest.raises(AssertionError, match="0 in flight"):
            fleet.await_idle(1.0)


def test_a_killed_scheduler_is_not_noticed_and_nobody_registers_again(fleet: Fleet) -> None:
    async def run() -> None:
        before = {entry["url"]: (entry["slot"], entry["generation"]) for entry in fleet.instances()}
        with Client(fleet.port) as client:
            blow = await strike(fleet, client, "scheduler")
            assert all(exchange.whole for exchange in blow.begun + blow.late)
            fleet.await_replaced("scheduler", blow.pid)
            calm(fleet)
            assert {entry["url"]: (entry["slot"], entry["generation"]) for entry in fleet.instances()} == before
            compare(fleet, client)
            await even(fleet, client, "after")

    asyncio.run(run())


@pytest.mark.parametrize("name", ["http", "zmq"])
def test_a_killed_engine_ends_its_streams_with_an_error_and_others_take_what_had_not_begun(
    fleet: Fleet, name: str
) -> None:
    async def run() -> None:
        with Client(fleet.port) as client:
            blow = await strike(fleet, client, name)
            assert all(exchange.whole for exchange in blow.late), blow.late
            ended = [exchange for exchange in blow.begun if not exchange.whole]
            assert ended, "the killed engine had no stream"
            for exchange in ended:
                assert exchange.state is State.FINISHED, exchange
                assert exchange.error() is not None, exchange
                assert exchange.fingerprint() == name
            assert all(exchange.fingerprint() != name for exchange in blow.begun if exchange.whole)
            fleet.await_idle()
            start(fleet, f"{name}-again", ENGINES[name])
            calm(fleet)
            compare(fleet, client)
            await even(fleet, client, "after")

    asyncio.run(run())


@pytest.mark.stress
def test_three_blows_one_after_another_leave_everything_as_it_was(fleet: Fleet) -> None:
    """One run, one client, one ledger: a frontend, the scheduler and an engine are killed in turn."""

    async def run() -> None:
        before = {entry["url"]: (entry["slot"], entry["generation"]) for entry in fleet.instances()}
        http = fleet.engines["http"].url
        with Client(fleet.port) as client:
            for name in ("frontend-1", "scheduler", "http"):
                blow = await strike(fleet, client, name)
                lost = [exchange for exchange in blow.begun if not exchange.whole]
                if name == "frontend-1":
                    assert lost
                    assert all(exchange.state is State.BROKEN for exchange in lost), lost
                else:
                    # Whatever had not begun to stream succeeds.
                    assert all(exchange.whole for exchange in blow.late), blow.late
                if name == "scheduler":
                    assert lost == []
                if name == "http":
                    assert lost
                    assert all(e.state is State.FINISHED and e.error() and e.fingerprint() == name for e in lost), lost
                    fleet.await_idle()
                    start(fleet, "http-again", "http")
                else:
                    fleet.await_replaced(name, blow.pid)
                calm(fleet)
                compare(fleet, client)
                await even(fleet, client, f"after-{name}")
                # Nobody who lives on has registered again: each has its slot, in the same generation.
                after = {entry["url"]: (entry["slot"], entry["generation"]) for entry in fleet.instances()}
                assert [url for url, place in before.items() if after.get(url, place) != place] == []
                assert [url for url in before if url not in after and (name, url) != ("http", http)] == []

    asyncio.run(run())
