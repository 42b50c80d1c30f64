"""Clients that leave: the engine is idle at once, and nothing of them is kept, in counters, descriptors or memory."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.client import Client, Exchange, State, chat
from tests.support.processes import Fleet
from tests.support.waiting import PATIENCE_S, until

CHAT = "/v1/chat/completions"
ENGINES = {"http": "http", "zmq": "zmq"}
AS_LONG = 2
LANES = 16
"""Requests at once."""
LEAVING = 0.3
"""Share of the clients that leave; half of them before the first byte."""
GROWN = 3 * 1024 * 1024
"""Bytes of resident memory that a process may gain."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Every test leaves it idle."""
    with Fleet(tmp_path_factory.mktemp("leaving"), workers=2, config={"log": {"level": "warn"}}) as fleet:
        for name, transport in ENGINES.items():
            fleet.engine(name, "--transport", transport, "--speed", "4")
        fleet.await_instances(len(ENGINES))
        yield fleet


# -- at once -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [True, False], ids=["within the answer", "before the first byte"])
def test_the_engine_is_idle_within_200_ms_of_a_clients_leaving(fleet: Fleet, begun: bool) -> None:
    """The median of several. On a machine where one short request takes half of that, as long as `AS_LONG` of them:
    measured in turns, so that what slows the one slows the other."""
    delays, short = [], []

    def hang(after: int | None) -> None:
        for engine in fleet.engines.values():
            engine.fault(hang_after=after)

    async def leave() -> None:
        with Client(fleet.port) as client:
            asked_at = time.monotonic()
            assert (await client.ask(CHAT, chat("word", max_tokens=1))).whole
            until(lambda: all(engine.ledger()["idle"] for engine in fleet.engines.values()), "all idle")
            short.append(time.monotonic() - asked_at)
            hang(None if begun else 0)
            exchange = await client.send(CHAT, chat("word", max_tokens=10_000, ignore_eos=True))
            if begun:
                await asyncio.wait_for(exchange.first_byte, PATIENCE_S)
            busy = until(lambda: [e for e in fleet.engines.values() if not e.ledger()["idle"]], "an engine at work")
            assert exchange.state is State.OPEN
            left_at = time.monotonic()
            exchange.leave()
            await asyncio.sleep(0)  # the socket is closed in the loop's next turn
            until(lambda: busy[0].ledger()["idle"], "the engine idle")
            delays.append(time.monotonic() - left_at)
            assert bool(exchange.body) == begun
            assert busy[0].ledger()["requests"][-1]["state"] == "aborted"
            hang(None)

    for _ in range(12):
        asyncio.run(leave())
    assert statistics.median(delays) <= max(0.2, AS_LONG * statistics.median(short)), (delays, short)
    fleet.await_idle()


def test_a_frontend_that_did_not_look_would_let_the_engine_go_on(tmp_path: Path) -> None:
    """The protection switched off."""
    with Fleet(tmp_path, workers=1, instead={"frontend": "tests.support.standins.deaf_frontend"}) as fleet:
        engine = fleet.engine("zmq", "--transport", "zmq")
        fleet.await_instances(1)
        engine.fault(slow=5)  # 60 ms a word

        async def leave() -> None:
            with Client(fleet.port) as client:
                await client.send(CHAT, chat("word", max_tokens=500, ignore_eos=True))
                await asyncio.to_thread(until, lambda: not engine.ledger()["idle"], "the engine at work")

        asyncio.run(leave())
        with pytest.raises(AssertionError, match="the engine idle"):
            until(lambda: engine.ledger()["idle"], "the engine idle", 1.0)
        assert fleet.in_flight() == 1
        engine.fault(slow=0.1)
        engine.await_idle()


# -- nothing kept ------------------------------------------------------------------------------------------


async def visit(client: Client, id: str, rng: random.Random) -> Exchange:
    """One request; a client that leaves does so at a random moment of its part of the answer's time."""
    leaves = rng.random() < LEAVING
    words = rng.randrange(2, 12) * (3 if leaves else 1)
    exchange = await client.send(CHAT, chat(f"Prompt {id}", max_tokens=words, ignore_eos=True), id=id)
    if leaves:
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.003)
            if exchange.body:
                return await whole(exchange)
        else:
            await asyncio.wait_for(exchange.first_byte, PATIENCE_S)
            await asyncio.sleep(rng.random() * 0.02)
        exchange.leave()
        return exchange
    return await whole(exchange)


async def whole(exchange: Exchange) -> Exchange:
    await asyncio.wait_for(exchange.ended, PATIENCE_S)
    assert exchange.whole, exchange
    return exchange


async def visits(fleet: Fleet, number: int, seed: int) -> dict[str, int]:
    """That many requests; how many left before and after the first byte, and how many stayed."""
    rng = random.Random(seed)
    numbers = iter(range(number))
    counts = {"before": 0, "after": 0, "stayed": 0}

    async def lane() -> None:
        for k in numbers:
            # A client of its own for each, so that the ledger of this process does not grow.
            exchange = await visit(Client(fleet.port), f"visit-{seed}-{k}", rng)
            left = exchange.state is State.LEFT
            counts["stayed" if not left else "after" if exchange.body else "before"] += 1

    await asyncio.gather(*(lane() for _ in range(LANES)))
    return counts


class Held(dict[str, tuple[int, int]]):
    """What each of Penstock's processes holds: file descriptors, bytes of resident memory.

    Descriptors without the pooled connections to HTTP engines: there are as many as were used at once, at most `LANES`.
    """

    @classmethod
    def now(cls, fleet: Fleet) -> Held:
        own = {name: p for name, p in fleet.processes().items() if name not in fleet.engines}
        own["supervisor"] = psutil.Process(fleet.supervisor.popen.pid)
        engine = int(fleet.engines["http"].url.rpartition(":")[2])
        held = cls()
        for name, process in own.items():
            pooled = sum(bool(c.raddr) and c.raddr.port == engine for c in process.net_connections("tcp"))
            assert pooled <= LANES
            held[name] = process.num_fds() - pooled, process.memory_info().rss
        return held

    def grown(self, before: Held) -> dict[str, int]:
        return {name: rss - before[name][1] for name, (_, rss) in self.items()}

    def descriptors(self) -> dict[str, int]:
        return {name: fds for name, (fds, _) in self.items()}


@pytest.mark.parametrize(
    ("warm_up", "number", "bound"), [(200, 400, None), pytest.param(2000, 10_000, GROWN, marks=pytest.mark.stress)]
)
def test_nothing_is_kept_of_clients_that_left(fleet: Fleet, warm_up: int, number: int, bound: int | None) -> None:
    def calm() -> Held:
        fleet.await_idle()
        for engine in fleet.engines.values():
            engine.await_idle()
        return Held.now(fleet)

    asyncio.run(visits(fleet, warm_up, 1))
    before = calm()
    counts = asyncio.run(visits(fleet, number, 2))
    print(counts)
    for kind in ("before", "after"):
        assert counts[kind] > 0.05 * number, counts
    after = calm()
    print({name: f"{grown / 1024:.0f} KiB" for name, grown in after.grown(before).items()})
    until(
        lambda: Held.now(fleet).descriptors() == before.descriptors(),
        lambda: f"{before.descriptors()} -> {Held.now(fleet).descriptors()}",
    )
    if bound is not None:
        assert max(after.grown(before).values()) < bound, after.grown(before)
