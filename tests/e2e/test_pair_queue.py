"""Pairs whose legs take few requests: the others wait at Penstock, for either leg, and all are served."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.e2e.test_queue import all_wait, ended, event, gauge, hold, waiting
from tests.support.client import Client, Exchange, chat
from tests.support.processes import Fleet
from tests.support.waiting import until

PATH = "/v1/chat/completions"
REQUESTS = 12


def test_requests_for_pairs_wait_for_the_leg_that_is_full_and_hold_nothing(tmp_path: Path) -> None:
    with Fleet(tmp_path, workers=2, config={"server": {"splitwise": True}}) as fleet:
        for name, role, capacity in (("p0", "prefill", 1), ("d0", "decode", 2)):
            fleet.engine(name, "--transport", "zmq", "--role", role, "--capacity", str(capacity), "--model", "m")
        fleet.await_instances(2)

        async def run() -> list[Exchange]:
            with Client(fleet.port) as client:
                held = await hold(client, 2)
                line = [await client.send(PATH, chat(f"waits {k}", max_tokens=3)) for k in range(REQUESTS)]
                await all_wait(fleet, REQUESTS)
                assert fleet.in_flight() <= 4, "those in line hold nothing"
                assert len(fleet.engines["d0"].ledger()["requests"]) == 2
                gone = line.pop(3)
                gone.leave()
                await all_wait(fleet, REQUESTS - 1)
                for exchange in held:
                    exchange.leave()
                await ended(line)
                return line

        line = asyncio.run(run())
        assert all(exchange.whole for exchange in line), line
        assert all(float(exchange.headers["x-penstock-queue-ms"]) > 0 for exchange in line)
        assert len(fleet.engines["d0"].ledger()["requests"]) == REQUESTS + 1
        assert event(fleet, "tickets_granted") >= REQUESTS - 1
        assert gauge(fleet, "penstock_queue_timeout_requests_total") == 0
        fleet.await_idle()
        until(lambda: waiting(fleet) == 0, "an empty queue")
