"""Decisions see another frontend's dispatch at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from broker import config
from broker.counters import CounterColumn, CountersReader, attach_counters
from tests.support.client import Client, chat
from tests.support.processes import Fleet

INSTANCES, HELD = 8, 128


def test_requests_held_open_are_level_over_instances_whichever_frontend_took_them(tmp_path: Path) -> None:
    with Fleet(tmp_path, workers=2, config={"scheduler": {"policy": "request_num"}}) as fleet:
        for k in range(INSTANCES):
            fleet.engine(f"e{k}", "--transport", "zmq" if k % 2 else "http", "--hang-after", "1", "--speed", "10")
        fleet.await_instances(INSTANCES)

        async def hold() -> list[int]:
            with Client(fleet.port) as client:
                for k in range(HELD):
                    exchange = await client.send("/v1/chat/completions", chat(f"Prompt {k}"))
                    await asyncio.wait_for(exchange.first_byte, 10)
                return [instance["in_flight"] for instance in fleet.instances()]

        held = asyncio.run(hold())
        assert sum(held) == HELD
        assert max(held) <= 1.5 * HELD / INSTANCES, held
        segment = attach_counters(fleet.run_dir, config.parse((fleet.run_dir / "config.json").read_bytes()))
        rows = CountersReader(segment).window(CounterColumn.STARTED, 2, INSTANCES)
        shares = np.add.reduce(rows, 1) / rows.sum()
        del rows
        segment.close()
        assert shares.min() >= 0.4, shares
        fleet.await_idle()
