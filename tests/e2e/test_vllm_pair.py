"""Two real vLLM engines, prefill and decode, joined by NIXL over TCP: `make e2e-vllm VLLM_VENV=…`.

What is seen is written to `E2E_PAIR_TRANSCRIPT` when that names a file; docs/engines.md holds the last one.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import vllm
from tests.support.client import Client, State
from tests.support.processes import Fleet, fetch, free_port
from tests.support.waiting import until

VENV = os.environ.get("VLLM_VENV")
REASON = vllm.missing(VENV)

pytestmark = [
    pytest.mark.e2e_vllm,
    pytest.mark.timeout(900),
    # Without the 3.5 GB of a real engine there is nothing that this file could test.
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]

PROMPT = "The quick brown fox jumps over the lazy dog. " * 4
WITHIN_S = 40.0
"""A pair that has lost a half must have answered by then: `first-byte-secs` and some room for a slow machine."""


class Engine:
    def __init__(self, folder: Path, role: str, model: Path) -> None:
        folder.mkdir()
        self.role = role
        self.folder = folder
        self.port = free_port()
        self._model = model
        self._ports = free_port(), free_port()
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Also again, at the same address."""
        assert VENV is not None
        events, side = self._ports
        kv_role = {"prefill": "producer", "decode": "consumer"}[self.role]
        self.process = vllm.start(
            VENV, self.folder, self.port, events, kv_role=kv_role, side_port=side, model=self._model
        )

    def await_up(self) -> None:
        log = self.folder / "vllm.log"

        def up() -> bool:
            assert self.process.poll() is None, log.read_text()[-4000:]
            return vllm.is_up(self.port)

        until(up, lambda: f"vLLM ({self.role}) to start:\n{log.read_text()[-4000:]}", 500.0)


def transcribe(did: str, saw: object) -> None:
    path = os.environ.get("E2E_PAIR_TRANSCRIPT")
    if path:
        with Path(path).open("a") as file:
            file.write(f"$ {did}\n{saw if isinstance(saw, str) else json.dumps(saw, ensure_ascii=False)}\n\n")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    folder = tmp_path_factory.mktemp("pair")
    assert VENV is not None
    model = vllm.make_model(VENV, folder)
    engines = {role: Engine(folder / role, role, model) for role in ("prefill", "decode")}
    try:
        for engine in engines.values():
            engine.await_up()
        yield engines
    finally:
        for engine in engines.values():
            vllm.stop(engine.process)


@pytest.fixture(scope="module")
def fleet(pair: dict[str, Engine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    config = {"server": {"splitwise": True}, "timeouts": {"first-byte-secs": 30}}
    with Fleet(tmp_path_factory.mktemp("penstock"), workers=1, config=config) as running:
        for role, engine in pair.items():
            body = {"role": role, "host_ip": "127.0.0.1", "port": engine.port, "connector": "nixl"}
            assert running.post("/register", body)[0] == 200
        running.await_instances(2)
        yield running


def ask(url: str, **fields: object) -> Any:
    body = {"model": vllm.MODEL, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, **fields}
    status, answer = fetch(url + "/v1/completions", body, within=120)  # an engine's first request takes its time
    assert status == 200, answer
    return answer


def test_the_pair_says_what_one_engine_says_alone(pair: dict[str, Engine], fleet: Fleet) -> None:
    alone = ask(f"http://127.0.0.1:{pair['decode'].port}")["choices"][0]["text"]
    together = ask(fleet.url)
    assert together["choices"][0]["text"] == alone
    transcribe("one engine alone, temperature 0", repr(alone))
    transcribe("the pair through Penstock", repr(together["choices"][0]["text"]))
    _, metrics = fetch(f"http://127.0.0.1:{pair['decode'].port}/metrics")
    transfers = [line for line in metrics.splitlines() if line.startswith("vllm:nixl_") and "_count" in line]
    transcribe("curl decode:8000/metrics | grep nixl", "\n".join(transfers))
    asyncio.run(streamed(fleet, alone))


async def streamed(fleet: Fleet, alone: str) -> None:
    body = {"model": vllm.MODEL, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, "stream": True}
    with Client(fleet.port) as client:
        exchange = await client.ask("/v1/completions", body)
        assert exchange.whole
        assert exchange.text() == alone
        assert exchange.headers["x-router-prefill-url"] != exchange.headers["x-router-decode-url"]


def test_a_client_that_leaves_wedges_nobody(pair: dict[str, Engine], fleet: Fleet) -> None:
    asyncio.run(leaving(fleet))
    fleet.await_idle()
    for engine in pair.values():
        assert vllm.is_up(engine.port)
    assert ask(fleet.url)["choices"][0]["text"]


async def leaving(fleet: Fleet) -> None:
    fields = {"model": vllm.MODEL, "max_tokens": 300, "ignore_eos": True, "stream": True}
    with Client(fleet.port) as client:
        during_prefill = await client.send("/v1/completions", {**fields, "prompt": "A" + PROMPT})
        during_decode = await client.send("/v1/completions", {**fields, "prompt": "B" + PROMPT})
        await asyncio.wait_for(during_decode.first_byte, 60)
        during_prefill.leave()
        during_decode.leave()


def test_killing_prefill_gives_an_answer_or_an_error_and_spares_decode(pair: dict[str, Engine], fleet: Fleet) -> None:
    asyncio.run(killing(pair, fleet, "prefill"))


def test_killing_decode_gives_an_answer_or_an_error_and_spares_prefill(pair: dict[str, Engine], fleet: Fleet) -> None:
    pair["prefill"].start()
    pair["prefill"].await_up()
    fleet.await_instances(2, within=60)  # it comes back by itself
    asyncio.run(killing(pair, fleet, "decode"))


async def killing(pair: dict[str, Engine], fleet: Fleet, role: str) -> None:
    """One request's answer flows, three are on their way, when one half dies."""
    other = {"prefill": "decode", "decode": "prefill"}[role]
    fields = {"model": vllm.MODEL, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with Client(fleet.port) as client:
        flowing = await client.send("/v1/completions", {**fields, "prompt": "C" + PROMPT}, id="flowing")
        await asyncio.wait_for(flowing.first_byte, 60)
        waiting = [
            await client.send("/v1/completions", {**fields, "prompt": f"{n}{PROMPT}"}, id=f"waiting-{n}")
            for n in range(3)
        ]
        vllm.kill(pair[role].process)
        for exchange in (flowing, *waiting):
            state = await asyncio.wait_for(exchange.ended, 60 + WITHIN_S)
            assert state is State.FINISHED
            assert exchange.whole or exchange.error() is not None
            transcribe(f"{role} is killed; {exchange.id}", f"{exchange.status} {exchange.error() or 'a whole answer'}")
        if role == "decode":
            assert flowing.error() is not None
        late = await client.ask("/v1/completions", {**fields, "prompt": "D" + PROMPT}, within=WITHIN_S, id="late")
        assert late.status in (502, 503)
        transcribe(f"{role} is dead; a request after that", f"{late.status} {late.error()}")
    # Alone the survivor still does its work, and does it at once.
    answer = await asyncio.to_thread(ask, f"http://127.0.0.1:{pair[other].port}")
    assert answer["choices"][0]["text"]
    transcribe(f"{role} is dead; the other one, asked alone", repr(answer["choices"][0]["text"]))
    await asyncio.to_thread(fleet.await_idle)
