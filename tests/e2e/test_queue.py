"""Saturated instances in real processes: requests wait at Penstock, in order, and end one way or another."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.client import Client, Exchange, chat
from tests.support.processes import Fleet
from tests.support.waiting import PATIENCE_S, eventually, until

PATH = "/v1/chat/completions"


def gauge(fleet: Fleet, name: str) -> float:
    """The sum over all labels."""
    text: str = fleet.get("/metrics")[1]
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def event(fleet: Fleet, name: str) -> int:
    return int(gauge(fleet, f'penstock_scheduler_events_total{{event="{name}"}}'))


def waiting(fleet: Fleet) -> int:
    return int(gauge(fleet, "penstock_queue_tickets"))


def start(fleet: Fleet, engines: int, capacity: int, transport: str = "zmq", *flags: str) -> None:
    for k in range(engines):
        fleet.engine(f"e{k}", "--transport", transport, "--capacity", str(capacity), *flags)
    fleet.await_instances(engines)


def start_unknown(fleet: Fleet, name: str, capacity: int) -> None:
    """An HTTP engine that Penstock is not told the capacity of."""
    fleet.register(fleet.engine(name, "--transport", "http", "--capacity", str(capacity), "--router", ""))


async def ended(exchanges: Sequence[Exchange], within: float = PATIENCE_S) -> None:
    await asyncio.wait_for(asyncio.gather(*(exchange.ended for exchange in exchanges)), within)


async def all_wait(fleet: Fleet, count: int) -> None:
    await eventually(lambda: waiting(fleet) == count, lambda: f"{count} tickets; there are {waiting(fleet)}")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two frontends and one engine with one place. Every test leaves it idle."""
    with Fleet(tmp_path_factory.mktemp("queue"), workers=2) as fleet:
        start(fleet, 1, 1)
        yield fleet


async def hold(client: Client, count: int = 1) -> list[Exchange]:
    """Requests that fill the instances until they leave."""
    held = [await client.send(PATH, chat("holds", max_tokens=10_000, ignore_eos=True)) for _ in range(count)]
    await asyncio.wait_for(asyncio.gather(*(exchange.first_byte for exchange in held)), PATIENCE_S)
    assert all(exchange.status == 200 for exchange in held)
    return held


async def line_up(fleet: Fleet, client: Client, count: int, **fields: object) -> list[Exchange]:
    """Requests that wait, each in line before the next one is sent: their order is known."""
    line: list[Exchange] = []
    for k in range(count):
        line.append(await client.send(PATH, chat(f"waits {k}", max_tokens=3, **fields)))
        await all_wait(fleet, k + 1)
    return line


def queue_command(fleet: Fleet) -> str:
    command = [sys.executable, "-m", "broker.cli", "queue", "--port", str(fleet.port)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def begun(line: Sequence[Exchange]) -> list[float]:
    return [exchange.first_byte_at for exchange in line]


def test_requests_beyond_the_capacity_wait_and_are_served_in_order(fleet: Fleet) -> None:
    offered, granted = event(fleet, "tickets_offered"), event(fleet, "tickets_granted")
    asked = len(fleet.engines["e0"].ledger()["requests"])

    async def run() -> list[Exchange]:
        with Client(fleet.port) as client:
            (held,) = await hold(client)
            line = await line_up(fleet, client, 8)
            assert len(fleet.engines["e0"].ledger()["requests"]) == asked + 1, "the engine was sent more than it takes"
            held.leave()
            await ended(line)
            assert "x-penstock-queue-ms" not in held.headers
            return line

    line = asyncio.run(run())
    assert all(exchange.whole for exchange in line)
    assert begun(line) == sorted(begun(line))
    assert all(float(exchange.headers["x-penstock-queue-ms"]) > 0 for exchange in line)
    assert event(fleet, "tickets_offered") == offered + 8
    assert event(fleet, "tickets_granted") == granted + 8
    assert gauge(fleet, "penstock_queue_wait_seconds_count") >= 8
    fleet.await_idle()
    until(lambda: waiting(fleet) == 0, "an empty queue")


def test_a_high_priority_passes_and_a_low_one_lets_pass(fleet: Fleet) -> None:
    async def run() -> None:
        with Client(fleet.port) as client:
            (held,) = await hold(client)
            line = []
            for k, priority in enumerate(("low", "normal", "high")):
                headers = {"X-Penstock-Priority": priority}
                line.append(await client.send(PATH, chat(priority, max_tokens=3), headers=headers))
                await all_wait(fleet, k + 1)
            held.leave()
            await ended(line)
            assert begun(line) == sorted(begun(line), reverse=True)

    asyncio.run(run())
    fleet.await_idle()


def test_a_client_that_leaves_the_line_is_withdrawn(fleet: Fleet) -> None:
    withdrawn = event(fleet, "tickets_withdrawn")
    asked = len(fleet.engines["e0"].ledger()["requests"])

    async def run() -> None:
        with Client(fleet.port) as client:
            (held,) = await hold(client)
            *gone, stays = await line_up(fleet, client, 4)
            for exchange in gone:
                exchange.leave()
            await all_wait(fleet, 1)
            held.leave()
            await ended([stays])
            assert stays.whole

    asyncio.run(run())
    assert len(fleet.engines["e0"].ledger()["requests"]) == asked + 2
    assert event(fleet, "tickets_withdrawn") == withdrawn + 3
    fleet.await_idle()


def test_those_in_line_outlive_the_scheduler_and_keep_their_order(fleet: Fleet) -> None:
    async def run() -> list[Exchange]:
        with Client(fleet.port) as client:
            (held,) = await hold(client)
            line = await line_up(fleet, client, 6)
            epoch = fleet.get("/queue")[1]["scheduler"]["epoch"]
            fleet.await_replaced("scheduler", fleet.kill("scheduler"))
            successor = {"state": "alive", "epoch": epoch + 1}
            await eventually(lambda: fleet.get("/queue")[1]["scheduler"] == successor, "the next scheduler at work")
            await all_wait(fleet, 6)
            held.leave()
            await ended(line)
            return line

    line = asyncio.run(run())
    assert all(exchange.whole for exchange in line)
    assert begun(line) == sorted(begun(line))
    fleet.await_idle()


def test_while_the_scheduler_stands_still_those_in_line_are_served_all_the_same(fleet: Fleet) -> None:
    async def run() -> list[Exchange]:
        with Client(fleet.port) as client:
            fleet.freeze("scheduler")
            line = [await client.send(PATH, chat(f"{k}", max_tokens=5, ignore_eos=True)) for k in range(8)]
            await ended(line)
            fleet.thaw("scheduler")
            return line

    assert all(exchange.whole for exchange in asyncio.run(run()))
    fleet.await_idle()
    until(lambda: waiting(fleet) == 0, "an empty queue")


def test_a_frontend_that_dies_leaves_no_ticket_and_no_reservation(fleet: Fleet) -> None:
    async def run() -> None:
        with Client(fleet.port) as client:
            (held,) = await hold(client)
            line = await line_up(fleet, client, 6)
            for name in ("frontend-0", "frontend-1"):
                fleet.await_replaced(name, fleet.kill(name))
            await ended([held, *line])
            assert not any(exchange.whole for exchange in line)

    asyncio.run(run())
    until(lambda: waiting(fleet) == 0, "an empty queue")
    fleet.await_idle()

    async def again() -> None:
        with Client(fleet.port) as client:
            exchange = await client.ask(PATH, chat("after", max_tokens=2))
            assert exchange.whole
            assert "x-penstock-queue-ms" not in exchange.headers

    asyncio.run(again())


def test_an_idle_instance_steals_what_waits_at_a_busy_one(tmp_path: Path) -> None:
    """And before anything is full, neither the queue nor the scheduler has a part in it."""
    with Fleet(tmp_path, workers=2) as fleet:
        start(fleet, 1, 4)

        async def run() -> list[Exchange]:
            with Client(fleet.port) as client:
                held = await hold(client, 4)
                assert event(fleet, "tickets_offered") == 0
                line = await line_up(fleet, client, 4)
                fleet.engine("late", "--transport", "zmq", "--capacity", "1")
                await ended(line)
                shown = await asyncio.to_thread(queue_command, fleet)
                assert shown.startswith("0 requests")
                columns, *rows = (row.split() for row in shown.splitlines()[1:])
                found = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
                home, thief = (found[fleet.engines[name].url] for name in ("e0", "late"))
                assert (home["robbed"], home["stolen"], home["granted"], home["wait_ms"]) == ("4", "0", "0", "-")
                assert (thief["robbed"], thief["stolen"], thief["granted"]) == ("0", "4", "4")
                assert float(thief["wait_ms"]) > 0
                for exchange in held:
                    exchange.leave()
                return line

        line = asyncio.run(run())
        assert all(exchange.whole for exchange in line)
        assert [exchange.fingerprint() for exchange in line] == ["late"] * 4
        assert event(fleet, "tickets_stolen") == 4
        home = fleet.engines["e0"].url
        stolen = [line for line in fleet.supervisor.output.splitlines() if f"stolen_from={home}" in line]
        assert len(stolen) == 4, fleet.supervisor.output


def test_a_full_queue_answers_429_and_a_passed_deadline_503(tmp_path: Path) -> None:
    config = {"scheduler": {"queue-max-tickets": 2, "queue-timeout-secs": 3}}
    with Fleet(tmp_path, workers=1, config=config) as fleet:
        start(fleet, 1, 1)

        async def run() -> list[Exchange]:
            with Client(fleet.port) as client:
                (held,) = await hold(client)
                line = [await client.send(PATH, chat(f"{k}")) for k in range(3)]
                await ended(line)
                held.leave()
                return sorted(line, key=lambda exchange: exchange.status)

        full, *late = asyncio.run(run())
        assert [exchange.status for exchange in (full, *late)] == [429, 503, 503]
        errors: list[Any] = [exchange.error() for exchange in (full, *late)]
        assert [error["code"] for error in errors] == ["queue_full", "queue_timeout", "queue_timeout"]
        assert int(full.headers["retry-after"]) >= 1
        assert " 3 s" in errors[1]["message"]
        fleet.await_idle()
        until(lambda: waiting(fleet) == 0, "an empty queue")


def test_an_http_engine_of_unknown_capacity_is_full_when_it_says_so(tmp_path: Path) -> None:
    """Its own queue is seen in two reports running; from then on requests wait here, where they can be moved."""
    with Fleet(tmp_path, workers=1, config={"manager": {"metrics-interval-secs": 0.1}}) as fleet:
        start_unknown(fleet, "e0", 2)

        async def run() -> None:
            with Client(fleet.port) as client:
                held = await hold(client, 2)
                inside = [await client.send(PATH, chat(f"inside {k}", max_tokens=3)) for k in range(3)]
                late: list[Exchange] = []

                for k in range(100):
                    late.append(await client.send(PATH, chat(f"late {k}", max_tokens=3)))
                    await asyncio.sleep(0.05)  # a report's time
                    if waiting(fleet):
                        break
                for exchange in held:
                    exchange.leave()
                await ended([*inside, *late])
                assert all(exchange.whole for exchange in (*inside, *late))
                assert "x-penstock-queue-ms" in late[-1].headers

        asyncio.run(run())
        fleet.await_idle()


def test_requests_stuck_in_a_loaded_engine_are_taken_back_for_an_idle_one(tmp_path: Path) -> None:
    """Its capacity is not known, so they were sent; now they wait inside it, and another engine joins."""
    settings = {"manager": {"metrics-interval-secs": 0.1}, "scheduler": {"rescues-per-sec": 20}}
    with Fleet(tmp_path, workers=2, config=settings) as fleet:
        start_unknown(fleet, "e0", 1)

        async def run() -> list[Exchange]:
            with Client(fleet.port) as client:
                (held,) = await hold(client)
                inside = [await client.send(PATH, chat(f"inside {k}", max_tokens=3)) for k in range(3)]
                await eventually(
                    lambda: len(fleet.engines["e0"].ledger()["requests"]) == 4,
                    lambda: f"all sent: {fleet.engines['e0'].ledger()} {fleet.get('/queue')} {fleet.instances()}",
                )
                start_unknown(fleet, "late", 1)
                await ended(inside)
                held.leave()
                return inside

        inside = asyncio.run(run())
        assert all(exchange.whole for exchange in inside)
        assert [exchange.fingerprint() for exchange in inside] == ["late"] * 3
        assert gauge(fleet, "penstock_instance_rescued_requests_total") == 3
        full, idle = (fleet.engines[name].url for name in ("e0", "late"))
        said = f" rescued_from={full} "
        lines = until(
            lambda: (
                len(found := [line for line in fleet.supervisor.output.splitlines() if said in line]) == 3 and found
            ),
            "three lines that say from where",
        )
        assert all(f" instance={idle} " in line for line in lines)
        assert len(fleet.engines["late"].ledger()["requests"]) == 3
        fleet.engines["e0"].await_idle()
        fleet.await_idle()
