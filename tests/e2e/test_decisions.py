"""Decisions see another frontend's dispatch at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from broker import config
from broker.counters import CounterColumn, attach_counters
from tests.support.client import Client, chat
from tests.support.processes import Fleet
from tests.support.standins.stale_frontend import COPIED
from tests.support.waiting import PATIENCE_S, eventually

INSTANCES, HELD = 8, 128
BURST = 32
"""Requests that come at once; the first ones are answered before the next ones come."""
SHARE = 0.4
"""Of the requests, at least, through each frontend."""
LEVEL = 1.5
"""Times the mean, at most, at the worst instance."""
FRONTENDS = "frontend-0", "frontend-1"
STANDINS = "tests.support.standins"


def start(fleet: Fleet) -> None:
    """Engines that hold every request open after its first word."""
    for k in range(INSTANCES):
        fleet.engine(f"e{k}", "--transport", "zmq" if k % 2 else "http", "--hang-after", "1", "--speed", "10")
    fleet.await_instances(INSTANCES)
    for name in fleet.engines:
        fleet.process(name).nice(10)  # frontends first: the decisions of a burst fall close together


async def burst(fleet: Fleet, client: Client, size: int) -> None:
    """So many requests at once, each until its first word."""
    frontends = [fleet.process(name) for name in FRONTENDS]
    # They queue up at stopped frontends: how close together they come is then not a matter of this client's speed.
    for name in FRONTENDS:
        fleet.freeze(name)
    exchanges = [await client.send("/v1/chat/completions", chat(f"Prompt {k}")) for k in range(size)]
    for frontend in frontends:
        frontend.resume()
    await asyncio.wait_for(asyncio.gather(*(exchange.first_byte for exchange in exchanges)), PATIENCE_S)


def held(fleet: Fleet) -> list[int]:
    """What each instance holds, when it is `HELD` in all."""
    found = [instance["in_flight"] for instance in fleet.instances()]
    assert sum(found) == HELD
    return found


def taken(fleet: Fleet) -> np.ndarray:
    """Requests that each frontend has dispatched."""
    segment = attach_counters(fleet.run_dir, config.parse((fleet.run_dir / "config.json").read_bytes()))
    rows = segment.array("slots")[:2, CounterColumn.STARTED, :INSTANCES]
    sums = np.add.reduce(rows, 1)
    del rows
    segment.close()
    return sums


def worst(held: list[int]) -> float:
    """The fullest instance, in times the mean."""
    return max(held) / (HELD / INSTANCES)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    # On a busy machine one frontend may have swallowed a burst before the other one is let run: these wait for it.
    instead = {"broker.scheduler": f"{STANDINS}.midrow_scheduler", "frontend": f"{STANDINS}.polite_frontend"}
    config = {"scheduler": {"policy": "request_num"}}
    with Fleet(tmp_path_factory.mktemp("decisions"), config=config, instead=instead) as fleet:
        start(fleet)
        yield fleet


@pytest.mark.parametrize("stopped", [False, True], ids=["scheduler alive", "scheduler stopped"])
def test_held_requests_are_level_over_instances_whichever_frontend_took_them(fleet: Fleet, stopped: bool) -> None:
    """Also while the scheduler stands in the middle of a row: what decides is in the frontends' own counters."""
    if stopped:
        fleet.freeze_scheduler_in_a_row()
    before = taken(fleet)

    async def hold() -> list[int]:
        with Client(fleet.port) as client:
            for _ in range(HELD // BURST):
                await burst(fleet, client, BURST)
            return held(fleet)

    found = asyncio.run(hold())
    shares = (taken(fleet) - before) / HELD
    assert shares.min() >= SHARE, shares
    assert worst(found) <= LEVEL, found
    if stopped:
        fleet.thaw("scheduler")
    fleet.await_idle()


def test_by_a_copy_of_the_counters_they_are_not(tmp_path: Path) -> None:
    """The protection switched off: whatever comes before the copy is renewed goes where the copy was lowest."""
    instead = {"frontend": f"{STANDINS}.stale_frontend"}
    with Fleet(tmp_path, config={"scheduler": {"policy": "request_num"}}, instead=instead) as fleet:
        start(fleet)

        async def hold() -> list[int]:
            with Client(fleet.port) as client:
                for _ in range(INSTANCES - 1):  # one each, by live counters: one instance alone is lowest
                    await burst(fleet, client, 1)
                for name in FRONTENDS:
                    fleet.process(name).send_signal(signal.SIGUSR1)
                await eventually(lambda: fleet.supervisor.output.count(COPIED) == 2, "the copies")
                await burst(fleet, client, HELD - INSTANCES + 1)
                return held(fleet)

        found = asyncio.run(hold())
        assert worst(found) > LEVEL, found
