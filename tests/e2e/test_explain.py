"""Why this instance: the header, the log line and the command say the same, whichever frontend is asked."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.client import Client, Exchange, chat
from tests.support.processes import Fleet
from tests.support.waiting import PATIENCE_S, eventually, until

PATH = "/v1/chat/completions"
PROMPT = "a prompt of some blocks " * 30


def command(fleet: Fleet, ident: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "broker.cli", "explain", ident, "--port", str(fleet.port)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def told(fleet: Fleet, ident: str) -> dict[str, Any]:
    """The request of that id, as JSON; nothing while nobody knows it."""
    status, answer = fleet.get(f"/explain/{ident}")
    return answer["requests"][0] if status == 200 else {}


def decision(exchange: Exchange) -> dict[str, str]:
    words = (word.partition("=") for word in exchange.headers["x-penstock-decision"].split(" "))
    return {key: value for key, _, value in words}


def test_header_log_line_and_command_agree_on_why(tmp_path: Path) -> None:
    with Fleet(tmp_path, workers=2) as fleet:
        for name, transport in (("e0", "zmq"), ("e1", "http")):
            fleet.engine(name, "--transport", transport, "--capacity", "1")
        fleet.await_instances(2)
        urls = {engine.url for engine in fleet.engines.values()}

        async def run() -> tuple[Exchange, Exchange]:
            with Client(fleet.port) as client:
                quiet = await client.ask(PATH, chat(PROMPT, max_tokens=2))
                held = [await client.send(PATH, chat("holds", max_tokens=10_000, ignore_eos=True)) for _ in urls]
                await asyncio.wait_for(asyncio.gather(*(exchange.first_byte for exchange in held)), PATIENCE_S)
                headers = {"X-Penstock-Explain": "1", "X-Request-Id": "stolen"}
                stolen = await client.send(PATH, chat(PROMPT, max_tokens=2), headers=headers)
                await eventually(lambda: told(fleet, "stolen").get("steps"), "the request in line")
                assert told(fleet, "stolen")["outcome"] == "under way"
                home = told(fleet, "stolen")["steps"][0]["home"]
                for exchange in held:
                    if told(fleet, exchange.headers["x-request-id"])["instance"] != home:
                        exchange.leave()
                await asyncio.wait_for(stolen.ended, PATIENCE_S)
                return quiet, stolen

        quiet, stolen = asyncio.run(run())
        assert "x-penstock-decision" not in quiet.headers
        assert stolen.whole
        said = decision(stolen)
        assert said["instance"] in urls
        assert said["policy"] == "prefix_cost"
        assert said["candidates"] == "2"
        assert {said["instance"], said["stolen_from"]} == urls
        assert float(said["queue_ms"]) > 0
        fleet.await_idle()
        lines = until(
            lambda: [line for line in fleet.supervisor.output.splitlines() if " id=stolen " in line], "its log line"
        )
        (line,) = lines
        assert f" instance={said['instance']} " in line
        assert f" stolen_from={said['stolen_from']} " in line
        assert f" queue_ms={said['queue_ms']} " in line
        text = command(fleet, "stolen").stdout
        assert f"status 200, at {said['instance']}" in text
        assert f"granted, from the line of {said['stolen_from']}" in text
        assert "the choice of prefix_cost among 2" in text
        for _ in range(8):  # connections of their own: both frontends are asked
            assert told(fleet, quiet.headers["x-request-id"])["status"] == 200

        unknown = command(fleet, "unheard-of")
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert "no request of that id is remembered" in unknown.stderr

        fleet.freeze("scheduler")
        until(lambda: fleet.get("/queue")[1]["scheduler"]["state"] == "away", "the scheduler is missed")
        until(lambda: told(fleet, "stolen"), "the frontend that served it, which is asked by chance")
        fleet.thaw("scheduler")
