"""The command lines by which Penstock is compared with other routers, as they are written there."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.client import Client, chat
from tests.support.processes import Fleet

POLICIES = ["round_robin", "request_num", "cache_aware"]
CONFIG = "server:\n  splitwise: false\nscheduler:\n  policy: {policy}\nlog:\n  level: error\n  output: file\n"
COMMAND = ["--host", "127.0.0.1", "--port", "{port}", "--workers", "1", "--config_path", "{cwd}/c.yaml"]
ENGINES = 3


@pytest.fixture(params=POLICIES)
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, workers=1, arguments=["--config_path", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text(CONFIG.format(policy=request.param))
    # Nothing but where shared memory lies is added to the command.
    shm = ["--shm-dir", str(fleet.shm_dir)]
    given = [word.format(port=fleet.port, cwd=tmp_path) for word in COMMAND]
    assert sorted(fleet._flags) == sorted([*given, *shm])
    with fleet:
        yield fleet


def test_the_compared_command_line_works(fleet: Fleet) -> None:
    assert fleet.get("/health")[0] == 200
    names = [f"e{k}" for k in range(ENGINES)]
    for name in names:
        engine = fleet.engine(name, "--transport", "http", "--speed", "10", "--router", "")
        fleet.register(engine, metrics_port=int(engine.url.rpartition(":")[2]), engine="openai")
    instances = fleet.instances()  # at once: 200 says that they are seen
    assert [(i["engine"], i["state"], i["role"]) for i in instances] == [("openai", "ready", "mixed")] * ENGINES

    async def ask() -> None:
        with Client(fleet.port) as client:
            for stream in (True, False):
                asked = [
                    await client.ask("/v1/chat/completions", chat(f"Hi {k}", stream=stream, max_tokens=3))
                    for k in range(4 * ENGINES)
                ]
                assert all(exchange.whole for exchange in asked), asked
                counts = Counter(exchange.fingerprint() for exchange in asked)
                policy = yaml.safe_load((fleet.root / "c.yaml").read_text())["scheduler"]["policy"]
                if policy == "round_robin":
                    assert counts == dict.fromkeys(names, 4)

    asyncio.run(ask())
    fleet.await_idle()
    # Quiet: nothing but the banner on the terminal, and a log file that holds errors only.
    assert " INFO " not in fleet.supervisor.output
    assert (fleet.root / "logs" / "penstock.log").read_text() == ""
    assert psutil.Process(fleet.supervisor.popen.pid).cwd() == str(fleet.root)
