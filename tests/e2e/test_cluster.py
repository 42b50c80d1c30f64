"""Hosts that share over a real Redis: real Penstocks, real engines, and what happens when one of them dies.

Hosts of one test run on one machine, so instances on loopback are offered, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.support.client import Client, Exchange, State, chat
from tests.support.processes import Engine, Fleet, free_port
from tests.support.redis import RedisServer
from tests.support.waiting import PATIENCE_S, eventually, until

PATH = "/v1/chat/completions"
SLOW = ("--decode-step-ms", "20")


def host(root: Path, redis: RedisServer, *, least: int = 1) -> Fleet:
    root.mkdir()
    flags = ["--scheduler-name", "global", "--scheduler-port", str(redis.port)]
    return Fleet(root, workers=1, arguments=[*flags, "--scheduler-min-load-score", str(least)])


def metric(fleet: Fleet, name: str) -> int:
    text: str = fleet.get("/metrics")[1]
    return int(sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)))


def cluster(fleet: Fleet, name: str) -> int:
    return metric(fleet, f"penstock_cluster_{name}")


def event(fleet: Fleet, name: str) -> int:
    return metric(fleet, f'penstock_scheduler_events_total{{event="{name}"}}')


def lent(fleet: Fleet) -> int:
    return metric(fleet, "penstock_queue_lent")


def joined(fleet: Fleet, members: int) -> bool:
    ready = fleet.get("/ready")[1]
    return ready["cluster"] == {"state": "joined", "members": members}


def await_joined(*fleets: Fleet) -> None:
    for fleet in fleets:
        until(partial(joined, fleet, len(fleets)), f"{len(fleets)} members at {fleet.url}")


def is_alone(fleet: Fleet) -> bool:
    ready = fleet.get("/ready")[1]
    return ready["cluster"] == {"state": "away", "members": 0}


def calm(*fleets: Fleet) -> None:
    """Nothing waits, runs or is lent any more."""
    for fleet in fleets:
        fleet.await_idle()
        for engine in fleet.engines.values():
            engine.await_idle()
        until(partial(nothing_moves, fleet), lambda: f"nothing lent or borrowed: {fleets[0].get('/queue')}")


def nothing_moves(fleet: Fleet) -> bool:
    shown = fleet.get("/queue")[1]["cluster"]
    return shown.get("borrowed") == 0 == shown.get("lent") == lent(fleet)


def finished(fleet: Fleet) -> list[tuple[str, int]]:
    """The answers that its engines gave whole: request and bytes."""
    entries = [entry for engine in fleet.engines.values() for entry in engine.ledger()["requests"]]
    return [(entry["id"], entry["bytes"]) for entry in entries if entry["state"] == "finished"]


async def hold(client: Client, count: int = 1) -> list[Exchange]:
    """Requests that fill the instances until they leave."""
    held = [await client.send(PATH, chat("holds", max_tokens=10_000, ignore_eos=True)) for _ in range(count)]
    await asyncio.wait_for(asyncio.gather(*(exchange.first_byte for exchange in held)), PATIENCE_S)
    return held


async def ended(exchanges: Sequence[Exchange], within: float = PATIENCE_S) -> None:
    done = asyncio.gather(*(exchange.ended for exchange in exchanges))
    await asyncio.wait_for(done, within)


def start_fast(fleet: Fleet, name: str) -> None:
    fleet.engine(name, "--transport", "zmq", "--capacity", "1", "--decode-step-ms", "1")


def is_ready(fleet: Fleet, url: str) -> bool:
    return any(instance["url"] == url and instance["state"] == "ready" for instance in fleet.instances())


def slow(fleet: Fleet, times: float) -> None:
    """Its engines, for what is to be under way for certain, however busy the machine is."""
    for engine in fleet.engines.values():
        engine.fault(slow=times)


def fast(hosts: Sequence[Fleet]) -> Engine:
    """The first host's engine."""
    (engine,) = hosts[0].engines.values()
    return engine


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@contextlib.contextmanager
def away(redis: RedisServer) -> Iterator[None]:
    """It dies, and comes back empty."""
    redis.kill()
    try:
        yield
    finally:
        redis.start()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[list[Fleet]]:
    """Three hosts, each with one engine with one place: the first host's is fast. Every test leaves them idle."""
    root = tmp_path_factory.mktemp("cluster")
    fleets = [host(root / name, redis) for name in ("one", "two", "n")]
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor() as starting:
            for started in [starting.submit(fleet.__enter__) for fleet in fleets]:
                stack.push(started.result().__exit__)
        start_fast(fleets[0], "fast-1")
        fleets[1].engine("two", "--transport", "http", "--capacity", "1", *SLOW)
        fleets[2].engine("n", "--transport", "http", "--capacity", "1", *SLOW)
        for fleet in fleets:
            fleet.await_instances(1)
        await_joined(*fleets)
        yield fleets


def test_the_documents_picture(hosts: list[Fleet]) -> None:
    """Three requests at each of three nodes; node 1 is done first and takes over what waits at the others. The result
    arrives at the client of the node that was asked, in order and whole."""

    async def run() -> dict[str, list[Exchange]]:
        asked: dict[str, list[Exchange]] = {}
        for fleet in hosts[1:]:
            slow(fleet, 5)  # 4 s a request: whatever waits there is taken over long before
        with contextlib.ExitStack() as stack:
            for name, fleet in (("two", hosts[1]), ("n", hosts[2]), ("one", hosts[0])):
                client = stack.enter_context(Client(fleet.port))
                bodies = [chat(f"{name} {k}", max_tokens=40, ignore_eos=True) for k in range(3)]
                asked[name] = [await client.send(PATH, body, id=f"{name}-{k}") for k, body in enumerate(bodies)]
            await ended([exchange for line in asked.values() for exchange in line])
        for fleet in hosts[1:]:
            slow(fleet, 1)
        return asked

    asked = asyncio.run(run())
    given = sorted(answer for fleet in hosts for answer in finished(fleet))
    every = [exchange for line in asked.values() for exchange in line]
    assert all(exchange.whole for exchange in every)
    assert given == sorted((exchange.id, len(exchange.body)) for exchange in every)  # each once, to the last byte
    assert all(exchange.fingerprint() == "fast-1" for exchange in asked["one"])
    stolen = [exchange for exchange in asked["two"] + asked["n"] if exchange.fingerprint() == "fast-1"]
    assert len(stolen) >= 2
    assert sum(cluster(fleet, "accepted_total") for fleet in hosts) == len(stolen)
    calm(*hosts)
    assert cluster(hosts[0], "lent_total") == len(stolen)
    assert cluster(hosts[0], "expired_total") == 0
    log = hosts[1].supervisor.output + hosts[2].supervisor.output
    (url,) = [engine.url for engine in hosts[0].engines.values()]
    assert log.count(f"instance={url}@") == len(stolen)
    assert log.count("stolen_from=http://127.0.0.1:") == len(stolen)


def test_an_unsaturated_request_touches_neither_queue_nor_redis(hosts: list[Fleet]) -> None:
    async def run() -> None:
        with Client(hosts[0].port) as client:
            for k in range(50):
                exchange = await client.ask(PATH, chat(f"alone {k}", max_tokens=1))
                assert exchange.whole
                assert "x-penstock-queue-ms" not in exchange.headers

    began = time.monotonic()
    beats = cluster(hosts[0], "round_trips_total")
    queued = event(hosts[0], "tickets_offered")
    asyncio.run(run())
    assert event(hosts[0], "tickets_offered") == queued
    # A beat and a look into the inbox, every second, and nothing besides.
    assert cluster(hosts[0], "round_trips_total") - beats <= 2 * (time.monotonic() - began + 2)


def test_the_queue_command_shows_the_hosts(hosts: list[Fleet]) -> None:
    command = [sys.executable, "-m", "broker.cli", "queue", "--port", str(hosts[1].port)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "cluster default: joined; 0 requests elsewhere, 0 places lent" in shown
    for other in (hosts[0], hosts[2]):
        assert f":{other.port} " in shown


def test_a_client_that_leaves_gives_the_place_back(hosts: list[Fleet]) -> None:
    returned = cluster(hosts[0], "returned_total")

    async def run() -> None:
        with Client(hosts[1].port) as client:
            await hold(client, 2)  # the second one at another host
            await eventually(lambda: lent(hosts[0]) + lent(hosts[2]) == 1, "a place lent")

    asyncio.run(run())
    calm(*hosts)
    assert sum(cluster(fleet, "returned_total") for fleet in hosts) > returned
    assert all(cluster(fleet, "expired_total") == 0 for fleet in hosts)


@pytest.mark.parametrize("whose", ["origin", "thief"])
def test_a_killed_scheduler_costs_no_stolen_request_anything(hosts: list[Fleet], whose: str) -> None:
    """The stream goes on, and its place stays its own until it ends."""

    async def run() -> None:
        with Client(hosts[1].port) as client, Client(hosts[0].port) as other, Client(hosts[2].port) as third:
            await hold(third)
            (own,) = await hold(client)
            slow(hosts[0], 20)
            stolen = await client.send(PATH, chat("long", max_tokens=3000, ignore_eos=True))
            await asyncio.wait_for(stolen.first_byte, PATIENCE_S)
            assert lent(hosts[0]) == 1
            victim = hosts[1] if whose == "origin" else hosts[0]
            pid = victim.kill("scheduler")
            await asyncio.to_thread(victim.await_replaced, "scheduler", pid)
            await eventually(lambda: joined(victim, 3), "joined again")
            await eventually(lambda: lent(hosts[0]) == 1, lambda: f"the place is kept; {lent(hosts[0])} lent")
            # Nobody else gets it: the thief's own request waits.
            late = await other.send(PATH, chat("late", max_tokens=1))
            await eventually(lambda: metric(hosts[0], "penstock_queue_tickets") == 1, "in line")
            slow(hosts[0], 1)
            await ended([stolen])
            assert stolen.whole
            assert stolen.fingerprint() == "fast-1"
            await ended([late])
            assert late.whole
            assert late.first_byte_at > stolen.ended_at
            own.leave()

    asyncio.run(run())
    calm(*hosts)


def test_a_stolen_request_whose_engine_dies_before_it_answers_is_served_at_home(hosts: list[Fleet]) -> None:
    """It goes back to its place in line."""
    fast(hosts).fault(slow=1000)

    async def run() -> None:
        with Client(hosts[1].port) as client, Client(hosts[2].port) as third:
            await hold(third)
            (own,) = await hold(client)
            stolen = await client.send(PATH, chat("unlucky " + "word " * 50, max_tokens=2))
            await eventually(lambda: lent(hosts[0]) == 1, "stolen")
            await eventually(lambda: not fast(hosts).ledger()["idle"], "it has arrived")
            hosts[0].kill("fast-1")
            later = await client.send(PATH, chat("later", max_tokens=1))
            await eventually(lambda: metric(hosts[1], "penstock_queue_tickets") == 2, "both in line")
            own.leave()
            await ended([stolen, later])
            assert stolen.whole
            assert later.whole
            assert stolen.fingerprint() == "two"
            assert stolen.first_byte_at < later.first_byte_at

    asyncio.run(run())
    start_fast(hosts[0], "fast-2")
    until(lambda: is_ready(hosts[0], fast(hosts).url), "the new engine is registered")
    calm(*hosts)


def test_without_redis_every_host_goes_on_alone_and_comes_back(hosts: list[Fleet], redis: RedisServer) -> None:
    async def asked(fleet: Fleet, count: int) -> None:
        with Client(fleet.port) as client:
            exchanges = [await client.send(PATH, chat(f"away {k}", max_tokens=3)) for k in range(count)]
            await ended(exchanges)
            assert all(exchange.whole for exchange in exchanges)

    with away(redis):
        for fleet in hosts:
            until(partial(is_alone, fleet), "away")
            assert fleet.get("/ready")[0] == 200
            assert fleet.get("/queue")[1]["cluster"]["reason"]
            assert cluster(fleet, "joined") == 0
            asyncio.run(asked(fleet, 4))  # they wait for the one place, and are served
    await_joined(*hosts)
    assert all(cluster(fleet, "lost_total") >= 1 for fleet in hosts)
    before = sum(cluster(fleet, "accepted_total") for fleet in hosts)

    async def run() -> None:
        with Client(hosts[1].port) as client:
            held = await hold(client, 2)
            for exchange in held:
                exchange.leave()

    asyncio.run(run())
    assert sum(cluster(fleet, "accepted_total") for fleet in hosts) > before
    calm(*hosts)


@pytest.mark.stress
def test_a_stream_outlives_redis(hosts: list[Fleet], redis: RedisServer) -> None:
    """The request runs on; the thief takes its place back after the lease, by its own clock."""

    async def run() -> None:
        with Client(hosts[1].port) as client, Client(hosts[2].port) as third:
            await hold(third)
            (own,) = await hold(client)
            slow(hosts[0], 20)
            stolen = await client.send(PATH, chat("long", max_tokens=2500, ignore_eos=True))
            await asyncio.wait_for(stolen.first_byte, PATIENCE_S)
            with away(redis):
                await eventually(lambda: lent(hosts[0]) == 0, "the lease is over")
                slow(hosts[0], 1)
                await ended([stolen])
            assert stolen.whole
            own.leave()

    asyncio.run(run())
    assert sum(cluster(fleet, "expired_total") for fleet in hosts) >= 1
    await_joined(*hosts)
    calm(*hosts)


@pytest.mark.stress
def test_a_host_that_dies_whole_gives_back_what_it_had_borrowed(
    hosts: list[Fleet], redis: RedisServer, tmp_path: Path
) -> None:
    """Its leases end; its tickets are gone with its term, nobody runs them."""
    expired = cluster(hosts[0], "expired_total")
    doomed = host(tmp_path / "doomed", redis)
    with contextlib.suppress(AssertionError), doomed:
        doomed.engine("doomed", "--transport", "http", "--capacity", "1", *SLOW)
        doomed.await_instances(1)

        async def run() -> None:
            with Client(doomed.port) as client, Client(hosts[1].port) as two, Client(hosts[2].port) as third:
                await hold(two)
                await hold(third)
                await hold(client, 2)
                assert lent(hosts[0]) == 1
                waits = await client.send(PATH, chat("never runs"), id="never")
                await eventually(lambda: metric(doomed, "penstock_queue_tickets") == 1, "in line")
                # The scheduler before the frontend, else it would give back what that had borrowed.
                first = [psutil.Process(doomed.supervisor.popen.pid), doomed.process("scheduler")]
                for process in [*first, *doomed.left()]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                await ended([waits])
                assert waits.state is State.BROKEN

        asyncio.run(run())
        fast(hosts).await_idle()  # the connections broke
    calm(*hosts)
    assert cluster(hosts[0], "expired_total") == expired + 1
    await_joined(*hosts)
    assert "never" not in [id for fleet in hosts for id, _ in finished(fleet)]


def test_a_redis_that_cannot_be_used_stops_the_start_with_a_sentence(tmp_path: Path, redis: RedisServer) -> None:
    flags = ["--port", str(free_port()), "--shm-dir", str(tmp_path), "--scheduler-name", "global"]
    flags += ["--scheduler-port", str(redis.port), "--scheduler-password", "no such"]
    command = [sys.executable, "-m", "broker.cli", "serve", *flags]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert f"Redis at 127.0.0.1:{redis.port}, db 0: scheduler.password is wrong or missing" in line
    assert "no such" not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.stress
def test_a_host_may_be_told_to_start_without_redis_and_joins_when_it_comes(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    settings = {"scheduler": {"name": "global", "port": server.port, "unreachable": "local"}}
    root = tmp_path / "host"
    root.mkdir()
    with Fleet(root, workers=1, config=settings) as fleet:
        assert is_alone(fleet)
        assert "going on alone: Redis at 127.0.0.1" in fleet.supervisor.output
        with server:
            await_joined(fleet)
