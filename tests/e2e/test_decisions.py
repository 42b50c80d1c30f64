"""Decisions see another frontend's dispatch at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from broker import config
from broker.counters import CounterColumn, CountersReader, attach_counters
from tests.support.client import Client, chat
from tests.support.processes import Fleet

INSTANCES, HELD = 8, 128
BURST = 32
"""Requests that come at once; the first ones are answered before the next ones come."""
ATTEMPTS = 3
"""Until requests came through both frontends alike: on a machine that is busy, the kernel may let one run alone."""
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


def hold(fleet: Fleet) -> list[int]:
    """What each instance holds when `HELD` requests are held open that came through both frontends."""
    for _ in range(ATTEMPTS):
        held, shares = hold_once(fleet)
        if shares.min() >= SHARE:
            return held
    raise AssertionError(f"one frontend took too few in {ATTEMPTS} attempts; the last shares: {shares}")


def hold_once(fleet: Fleet) -> tuple[list[int], np.ndarray]:
    """The same, however they came, and each frontend's share."""

    async def burst(client: Client, numbers: range) -> None:
        frontends = [fleet.process(name) for name in FRONTENDS]
        # They queue up at stopped frontends: how close together they come is then not a matter of this client's speed.
        for name in FRONTENDS:
            fleet.freeze(name)
        exchanges = [await client.send("/v1/chat/completions", chat(f"Prompt {k}")) for k in numbers]
        for frontend in frontends:
            frontend.resume()
        await asyncio.wait_for(asyncio.gather(*(exchange.first_byte for exchange in exchanges)), 30)

    async def run() -> list[int]:
        with Client(fleet.port) as client:
            for first in range(0, HELD, BURST):
                await burst(client, range(first, first + BURST))
            return [instance["in_flight"] for instance in fleet.instances()]

    before = taken(fleet)
    held = asyncio.run(run())
    assert sum(held) == HELD
    shares = (taken(fleet) - before) / HELD
    fleet.await_idle()
    return held, shares


def taken(fleet: Fleet) -> np.ndarray:
    """Requests that each frontend has dispatched."""
    segment = attach_counters(fleet.run_dir, config.parse((fleet.run_dir / "config.json").read_bytes()))
    rows = CountersReader(segment).window(CounterColumn.STARTED, 2, INSTANCES)
    sums = np.add.reduce(rows, 1)
    del rows
    segment.close()
    return sums


def worst(held: list[int]) -> float:
    """The fullest instance, in times the mean."""
    return max(held) / (HELD / INSTANCES)


@pytest.mark.parametrize("stopped", [False, True], ids=["scheduler alive", "scheduler stopped"])
def test_held_requests_are_level_over_instances_whichever_frontend_took_them(tmp_path: Path, stopped: bool) -> None:
    """Also while the scheduler stands in the middle of a row: what decides is in the frontends' own counters."""
    instead = {"broker.scheduler": f"{STANDINS}.midrow_scheduler"}
    with Fleet(tmp_path, config={"scheduler": {"policy": "request_num"}}, instead=instead) as fleet:
        start(fleet)
        if stopped:
            fleet.freeze_scheduler_in_a_row()
        held = hold(fleet)
        assert worst(held) <= LEVEL, held
        if stopped:
            fleet.thaw("scheduler")


def test_on_counters_that_are_100_ms_old_they_are_not(tmp_path: Path) -> None:
    """The protection switched off: what comes within one age of the copy goes where the copy was lowest."""
    instead = {"frontend": f"{STANDINS}.stale_frontend"}
    with Fleet(tmp_path, config={"scheduler": {"policy": "request_num"}}, instead=instead) as fleet:
        start(fleet)
        held = hold(fleet)
        assert worst(held) > LEVEL, held
