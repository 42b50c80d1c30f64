"""With a real vLLM (CPU build, tiny random model): `make e2e-vllm VLLM_VENV=…`, see install_vllm.sh.

What is seen is written to `E2E_TRANSCRIPT` when that names a file; docs/engines.md holds the last one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.support import vllm
from tests.support.client import Client, Exchange, State, chat
from tests.support.processes import Fleet, free_port
from tests.support.waiting import PATIENCE_S, eventually, until

VENV = os.environ.get("VLLM_VENV")
REASON = vllm.missing(VENV)

pytestmark = [
    pytest.mark.e2e_vllm,
    # Without the 3.5 GB of a real engine there is nothing that this file could test.
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]


class Transcript:
    """What a reader of docs/engines.md sees: command and answer, in order."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._lines: list[str] = []
        self.port = 0

    def add(self, did: str, saw: object) -> None:
        text = saw if isinstance(saw, str) else json.dumps(saw)
        # The engine's port is another one at every run.
        self._lines += [f"$ {did}", *text.replace(f":{self.port}", ":8000").rstrip().splitlines(), ""]
        if self._path:
            Path(self._path).write_text("\n".join(self._lines))


@pytest.fixture(scope="module")
def transcript() -> Transcript:
    return Transcript(os.environ.get("E2E_TRANSCRIPT"))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a vLLM that has started (a minute on two cores)."""
    folder = tmp_path_factory.mktemp("vllm")
    port = free_port()
    assert VENV is not None
    process = vllm.start(VENV, folder, port, free_port())
    log = folder / "vllm.log"

    def up() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        return vllm.is_up(port)

    try:
        until(up, lambda: f"vLLM to start:\n{log.read_text()[-4000:]}", 300.0)
        yield port
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        os.killpg(process.pid, signal.SIGTERM)
        _, left = psutil.wait_procs([psutil.Process(process.pid), *children], timeout=20)
        for child in left:
            child.kill()
        process.wait()


@pytest.fixture(scope="module")
def fleet(engine: int, tmp_path_factory: pytest.TempPathFactory, transcript: Transcript) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("penstock"), workers=2) as running:
        transcript.port = engine
        body = {"role": "mixed", "host_ip": "127.0.0.1", "port": engine}
        status, answer = running.post("/register", body)
        transcript.add('curl :30000/register -d \'{"role": "mixed", "host_ip": "127.0.0.1", "port": 8000}\'', answer)
        assert status == 200, answer
        yield running


def metric(fleet: Fleet, name: str) -> float | None:
    _, text = fleet.get("/metrics")
    for line in text.splitlines():
        if line.startswith(name + "{"):
            return float(line.rsplit(" ", 1)[1])
    return None


def test_kind_and_models_are_found_by_asking(fleet: Fleet, transcript: Transcript) -> None:
    (instance,) = fleet.await_instances(1)
    transcript.add("penstock instances --json", instance)
    assert instance["engine"] == "vllm"
    assert instance["models"] == [vllm.MODEL]
    status, answer = fleet.get("/v1/models")
    transcript.add("curl :30000/v1/models", answer)
    assert [model["id"] for model in answer["data"]] == [vllm.MODEL]
    status, answer = fleet.post("/v1/completions", {"model": "other", "prompt": "a"})
    transcript.add(
        'curl :30000/v1/completions -d \'{"model": "other", "prompt": "a"}\'', f"{status} {json.dumps(answer)}"
    )
    assert status == 404


def test_the_openai_client_gets_the_engines_text(engine: int, fleet: Fleet, transcript: Transcript) -> None:
    def ask(port: int, stream: bool) -> str:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            question = [{"role": "user", "content": "Say something."}]
            if stream:
                chunks = create(model=vllm.MODEL, messages=question, max_tokens=16, temperature=0, stream=True)
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            answer = create(model=vllm.MODEL, messages=question, max_tokens=16, temperature=0)
            return answer.choices[0].message.content or ""

    alone = ask(engine, False)
    assert alone
    assert ask(fleet.port, False) == alone
    assert ask(fleet.port, True) == alone
    transcript.add("the OpenAI client, temperature 0: the engine alone, through Penstock, streamed", repr(alone))


def test_errors_of_the_engine_pass_through(engine: int, fleet: Fleet, transcript: Transcript) -> None:
    body = {"model": vllm.MODEL, "prompt": "a", "max_tokens": -1}
    status, answer = fleet.post("/v1/completions", body)
    transcript.add(
        'curl :30000/v1/completions -d \'{"model": "tiny", "prompt": "a", "max_tokens": -1}\'',
        f"{status} {json.dumps(answer)}",
    )
    assert status == 400
    assert "max_tokens" in answer["error"]["message"]


def test_load_is_seen_and_a_client_that_leaves_is_aborted(fleet: Fleet, transcript: Transcript) -> None:
    asyncio.run(leave_in_the_middle(fleet, transcript))


def any_ended(exchanges: list[Exchange]) -> bool:
    return any(exchange.state is not State.OPEN for exchange in exchanges)


async def leave_in_the_middle(fleet: Fleet, transcript: Transcript) -> None:
    def seen(name: str, least: float, most: float) -> bool:
        value = metric(fleet, name)
        return value is not None and least <= value <= most

    async def under_way() -> list[Exchange]:
        """Four streams that have begun, and whose load is seen unless they are over."""
        started = [await client.send("/v1/chat/completions", chat(f"Number {n}", **fields)) for n in range(4)]
        for exchange in started:
            await asyncio.wait_for(exchange.first_byte, PATIENCE_S)
        await eventually(lambda: seen(running, 1, 4) or any_ended(started), "load in /metrics, or an end")
        return started

    running = "penstock_instance_running_requests"
    fields = {"model": vllm.MODEL, "max_tokens": 400, "ignore_eos": True}
    with Client(fleet.port) as client:
        for _ in range(20):  # so tiny a model may have answered before its load is asked for
            exchanges = await under_way()
            shown = [line for line in fleet.get("/metrics")[1].splitlines() if line.startswith("penstock_instance_")]
            (instance,) = fleet.instances()
            if not any_ended(exchanges):
                break
        else:
            pytest.fail("twenty times four streams ended before their load was seen")
        transcript.add("curl :30000/metrics | grep penstock_instance_, four streams under way", "\n".join(shown))
        assert instance["in_flight"] == 4
        for exchange in exchanges[:3]:
            exchange.leave()
        await eventually(lambda: fleet.in_flight() == 1, "three leases closed", 5)
        await eventually(lambda: seen(running, 0, 1), "three requests aborted in the engine", 15)
        transcript.add("three of the four clients leave", f"running in the engine: {metric(fleet, running)}")
        await asyncio.wait_for(exchanges[3].ended, 120)
        assert exchanges[3].state is State.FINISHED
        assert exchanges[3].whole
    await eventually(lambda: fleet.in_flight() == 0, "nothing in flight", 5)
    await eventually(lambda: seen(running, 0, 0), "an idle engine", 15)
