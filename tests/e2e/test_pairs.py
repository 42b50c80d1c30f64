"""Prefill/decode pairs of every connector behind a real Penstock, with simulated engines that take nothing wrong.

Their words depend on prompt, instance and what prefill handed over, so a right text proves the whole way.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.broker.worker.simulated import expected
from tests.support.client import Client, Exchange, State
from tests.support.processes import Fleet, fetch
from tests.support.waiting import PATIENCE_S, eventually, until

CONNECTORS = {
    "disaggregate_info": ("--dialect", "fastdeploy"),
    "bootstrap": ("--dialect", "sglang"),
    "nixl": ("--dialect", "vllm"),
    "mooncake": ("--dialect", "vllm", "--connector", "mooncake"),
    "p2p_nccl": ("--dialect", "vllm", "--connector", "p2p_nccl"),
    "native": ("--transport", "zmq"),
}
CONFIG = {
    "server": {"splitwise": True},
    "manager": {"health-check-interval-secs": 1},
    "timeouts": {"first-byte-secs": 40},
}


def add(fleet: Fleet, connector: str, role: str, number: int = 0) -> None:
    """One half; it serves the model that is called like its connector."""
    options = ("--role", role, "--model", connector, "--speed", "4")
    fleet.engine(f"{connector}-{role}-{number}", *CONNECTORS[connector], *options)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("pairs"), workers=2, config=CONFIG) as running:
        for connector in CONNECTORS:
            for role in ("prefill", "decode"):
                add(running, connector, role)
        running.await_instances(2 * len(CONNECTORS))
        yield running


def proven(fleet: Fleet, exchange: Exchange, body: dict[str, Any], connector: str) -> bool:
    """The text is the decode's, and not what it says without a handover."""
    text = exchange.text()
    assert exchange.whole, exchange.error()
    assert exchange.fingerprint() == f"{connector}-decode-0"
    assert len(text.split()) == body["max_tokens"]
    return text != expected("completion", body, f"{connector}-decode-0")


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_pair_answers_with_what_prefill_handed_over(fleet: Fleet, connector: str) -> None:
    async def run() -> None:
        body = {"model": connector, "prompt": f"Hello {connector}", "max_tokens": 6}
        with Client(fleet.port) as client:
            whole = await client.ask("/v1/completions", body)
            assert proven(fleet, whole, body, connector)
            stream = await client.ask("/v1/completions", {**body, "stream": True})
            assert proven(fleet, stream, body, connector)
            urls = [fleet.engines[f"{connector}-{role}-0"].url for role in ("prefill", "decode")]
            for exchange in (whole, stream):
                found = exchange.headers["x-router-prefill-url"], exchange.headers["x-router-decode-url"]
                assert list(found) == urls
            message = {"role": "user", "content": "Hi"}
            chat = await client.ask("/v1/chat/completions", {"model": connector, "messages": [message]})
            assert chat.whole

    asyncio.run(run())
    fleet.await_idle()
    for role in ("prefill", "decode"):
        engine = fleet.engines[f"{connector}-{role}-0"]
        engine.await_idle()
        assert {request["state"] for request in engine.ledger()["requests"]} <= {"finished"}


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_client_that_leaves_ends_both_halves(fleet: Fleet, connector: str, stage: str) -> None:
    body = {"model": connector, "prompt": "a" * 400, "max_tokens": 10_000, "ignore_eos": True, "stream": True}
    engines = [fleet.engines[f"{connector}-{role}-0"] for role in ("prefill", "decode")]

    async def run() -> None:
        with Client(fleet.port) as client:
            exchange = await client.send("/v1/completions", body)
            if stage == "decode":
                await asyncio.wait_for(exchange.first_byte, PATIENCE_S)
            else:
                await eventually(lambda: fleet.in_flight() > 0, "the request is under way")
            exchange.leave()
            await eventually(lambda: fleet.in_flight() == 0, fleet.instances)

    asyncio.run(run())
    for engine in engines:
        engine.await_idle()


def test_what_pairs_cannot_do_is_said(fleet: Fleet) -> None:
    status, answer = fleet.post("/v1/embeddings", {"model": "nixl", "input": "a"})
    assert (status, answer["error"]["code"]) == (400, "not_for_pairs")
    status, answer = fleet.post("/v1/completions", {"model": "nixl", "prompt": ["a", "b"]})
    assert status == 400
    assert "one by one" in answer["error"]["message"]
    status, answer = fleet.post("/v1/completions", {"prompt": "a", "kv_transfer_params": {"remote_host": "evil"}})
    assert (status, answer["error"]["param"]) == (400, "kv_transfer_params")


def test_a_mixed_instance_may_not_register(fleet: Fleet) -> None:
    status, answer = fleet.post("/register", {"role": "mixed", "host_ip": "127.0.0.1", "port": 1})
    assert status == 400
    assert "role" in answer["msg"]


def test_the_fleet_is_shown_in_fastdeploys_form(fleet: Fleet) -> None:
    status, answer = fleet.get("/registered")
    assert status == 200
    assert list(answer) == ["code", "decode", "mixed", "msg", "prefill"]
    assert (len(answer["prefill"]), len(answer["decode"]), answer["mixed"]) == (6, 6, [])
    ours = next(e for e in answer["decode"] if e["url"] == fleet.engines["disaggregate_info-decode-0"].url)
    port = ours["url"].rpartition(":")[2]
    assert ours == {
        "url": ours["url"],
        "worker_type": "decode",
        "connector_port": port,
        "engine_worker_queue_port": port,
        "transfer_protocol": ["ipc", "rdma"],
        "rdma_ports": [port],
        "device_ids": ["0"],
        "metrics_port": port,
        "tp_size": 1,
    }
    assert fleet.get("/registered_number") == (200, {"decode": 6, "mixed": 0, "prefill": 6})
    status, decodes = fleet.get("/decode_instances?version=0")
    assert status == 200
    assert {entry["role"] for entry in decodes} == {"DECODE"}
    assert {"host_ip": "127.0.0.1", "port": int(port)}.items() <= decodes[
        [entry["port"] for entry in decodes].index(int(port))
    ].items()
    assert fleet.get("/health_generate") == (200, {"code": 200, "msg": "Health check complete"})


def test_requests_are_aborted_wherever_they_are(fleet: Fleet) -> None:
    """Through another connection, and so, as often as not, another frontend than the one that has them."""

    async def run() -> None:
        with Client(fleet.port) as client:
            body = {"max_tokens": 10_000, "ignore_eos": True, "stream": True, "prompt": "abort me"}
            running = [
                await client.send("/v1/completions", {**body, "model": connector}, id=f"r-{connector}")
                for connector in CONNECTORS
            ]
            for exchange in running:
                await asyncio.wait_for(exchange.first_byte, PATIENCE_S)
            named, rest = running[:2], running[2:]
            asked = {"req_ids": [*(exchange.id for exchange in named), "nobody"]}
            answer = (await client.ask("/v1/abort_requests", asked)).json()
            aborted = {entry["request_id"]: entry["output_token_count"] for entry in answer["result"]["aborted"]}
            assert aborted.keys() == {exchange.id for exchange in named}
            assert min(aborted.values()) >= 1
            assert answer["result"]["not_found"] == ["nobody"]
            for exchange in named:
                assert await asyncio.wait_for(exchange.ended, PATIENCE_S) is State.FINISHED
                assert (exchange.error() or {})["code"] == "request_aborted"
            assert not any(exchange.state is not State.OPEN for exchange in rest)
            answer = (await client.ask("/v1/abort_requests", {"abort_all": True})).json()
            assert len(answer["result"]["aborted"]) == len(rest)
            for exchange in rest:
                await asyncio.wait_for(exchange.ended, PATIENCE_S)
            neither = await client.ask("/v1/abort_requests", {})
            assert (neither.status, neither.json()) == (400, {"error": "must provide abort_all=true or req_ids"})

    asyncio.run(run())
    fleet.await_idle()
    for engine in fleet.engines.values():
        engine.await_idle()


@pytest.mark.parametrize("connector", ["disaggregate_info", "nixl"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_half_costs_an_error_or_another_pair_and_nothing_is_left(
    fleet: Fleet, connector: str, role: str
) -> None:
    """Twelve streams under way when one of three engines dies."""
    name = f"{connector}-{role}-1"
    add(fleet, connector, role, 1)
    fleet.await_instances(2 * len(CONNECTORS) + 1)

    async def run() -> None:
        body = {"model": connector, "max_tokens": 60, "ignore_eos": True, "stream": True}
        with Client(fleet.port) as client:
            running = [await client.send("/v1/completions", {**body, "prompt": f"{n} " + "x" * 200}) for n in range(12)]
            await asyncio.wait_for(running[0].first_byte, PATIENCE_S)
            fleet.kill(name)
            for exchange in running:
                assert await asyncio.wait_for(exchange.ended, PATIENCE_S) is State.FINISHED
                assert exchange.whole or exchange.error() is not None

    async def after() -> None:
        with Client(fleet.port) as client:
            body = {"model": connector, "max_tokens": 8, "stream": True, "prompt": "after"}
            assert (await client.ask("/v1/completions", body)).whole

    asyncio.run(run())
    # Before the death is known, a decode may refuse for want of its prefill sooner than the prefill's own refusal.
    until(lambda: len([i for i in fleet.instances() if i["state"] == "ready"]) == 12, fleet.instances)
    asyncio.run(after())
    fleet.await_idle()
    for engine in fleet.engines.values():
        engine.await_idle()


def test_a_direct_request_to_decode_alone_is_an_error(fleet: Fleet) -> None:
    """Guards the tests above: without its handover no decode says anything."""
    for connector in ("disaggregate_info", "bootstrap", "nixl", "mooncake", "p2p_nccl"):
        url = fleet.engines[f"{connector}-decode-0"].url
        status, answer = fetch(url + "/v1/completions", {"model": connector, "prompt": "a", "max_tokens": 2})
        assert status >= 400, (connector, json.dumps(answer))
