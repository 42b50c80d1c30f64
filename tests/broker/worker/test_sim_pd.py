"""Prefill and decode instances of each dialect: the right object gives the right words, anything else an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from broker.worker.sim.pd import proof_of, transfer_data
from broker.worker.sim.text import prompt_of
from tests.broker.worker.simulated import Simulated, expected

BODY: dict[str, Any] = {"prompt": "Hello there", "max_tokens": 5}
ASK = {"do_remote_decode": True, "do_remote_prefill": False}


class Pair:
    def __init__(self, prefill: Simulated, decode: Simulated) -> None:
        self.prefill = prefill
        self.decode = decode

    def both(self, body: dict[str, Any], to_decode: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """To both at once, as SGLang and FastDeploy want it; decode's answer."""
        with ThreadPoolExecutor(1) as threads:
            prefill = threads.submit(self.prefill.call, "/v1/completions", body)
            answer = self.decode.call("/v1/completions", to_decode or body)
            assert prefill.result()[0] == 200
        return answer


@pytest.fixture(scope="module")
def pairs() -> Iterator[Callable[[str], Pair]]:
    made: dict[str, Pair] = {}
    engines: list[Simulated] = []

    def pair(dialect: str) -> Pair:
        if dialect not in made:
            prefill, decode = (
                Simulated("--dialect", dialect, "--role", role, name=f"{dialect}-{role}")
                for role in ("prefill", "decode")
            )
            engines.extend((prefill, decode))
            made[dialect] = Pair(prefill, decode)
        return made[dialect]

    yield pair
    for engine in engines:
        engine.__exit__()


def text(answer: tuple[int, bytes]) -> str:
    assert answer[0] == 200, answer
    found: str = json.loads(answer[1])["choices"][0]["text"]
    return found


# -- vLLM: one after the other ---------------------------------------------------------------------------------


def vllm_object(pair: Pair, body: dict[str, Any]) -> dict[str, Any]:
    asked = {**body, "max_tokens": 1, "stream": False, "kv_transfer_params": ASK}
    found: dict[str, Any] = pair.prefill.json("/v1/completions", asked)["kv_transfer_params"]
    return found


def test_vllm_decode_says_what_depends_on_the_object_it_got(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("vllm")
    given = vllm_object(pair, BODY)
    assert (given["do_remote_prefill"], given["do_remote_decode"]) == (True, False)
    answer = pair.decode.call("/v1/completions", {**BODY, "kv_transfer_params": given})
    assert text(answer) == expected("completion", BODY, "vllm-decode", transfer_data(given))
    assert json.loads(answer[1])["kv_transfer_params"] is None


@pytest.mark.parametrize("spoil", ["missing key", "changed key", "other prompt", "used twice", "none", "own request"])
def test_vllm_decode_refuses_any_other_object(pairs: Callable[[str], Pair], spoil: str) -> None:
    pair = pairs("vllm")
    given: dict[str, Any] | None = vllm_object(pair, BODY)
    assert given is not None
    body = BODY
    if spoil == "missing key":
        del given["tp_size"]
    elif spoil == "changed key":
        given["remote_block_ids"] = [[1]]
    elif spoil == "other prompt":
        body = {**BODY, "prompt": "Hello thera"}
    elif spoil == "used twice":
        assert pair.decode.call("/v1/completions", {**BODY, "kv_transfer_params": given})[0] == 200
    elif spoil == "none":
        given = None
    else:
        given = dict(ASK)
    status, _ = pair.decode.call("/v1/completions", {**body, "kv_transfer_params": given})
    assert status in (400, 500)


def test_vllm_prefill_gives_no_object_when_streaming_or_not_asked(pairs: Callable[[str], Pair]) -> None:
    prefill = pairs("vllm").prefill
    _, stream = prefill.call("/v1/completions", {**BODY, "stream": True, "kv_transfer_params": ASK})
    assert b"kv_transfer_params" not in stream
    assert prefill.json("/v1/completions", BODY)["kv_transfer_params"] is None


# -- SGLang and FastDeploy: both at once -----------------------------------------------------------------------


def sglang(pair: Pair, room: int) -> dict[str, Any]:
    boot = {"bootstrap_host": "127.0.0.1", "bootstrap_port": pair.prefill.port, "bootstrap_room": room}
    return {**BODY, **boot}


def fastdeploy(pair: Pair, request_id: str) -> dict[str, Any]:
    info = {
        "prefill_ip": "127.0.0.1",
        "decode_ip": "127.0.0.1",
        "prefill_connector_port": pair.prefill.port,
        "decode_connector_port": pair.decode.port,
        "decode_device_ids": ["0"],
        "decode_rdma_ports": [str(pair.decode.port)],
        "transfer_protocol": "ipc",
        "decode_tp_size": 1,
    }
    return {**BODY, "request_id": request_id, "disaggregate_info": info}


def test_sglang_decode_waits_for_the_room_of_its_prefill(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("sglang")
    proof = proof_of(prompt_of("completion", BODY), "sglang-prefill", str(2**62))
    answer = pair.both(sglang(pair, 2**62))
    assert text(answer) == expected("completion", BODY, "sglang-decode", proof.proof.encode())


def test_fastdeploy_decode_waits_for_the_request_id_of_its_prefill(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("fastdeploy")
    proof = proof_of(prompt_of("completion", BODY), "fastdeploy-prefill", "r1")
    answer = pair.both(fastdeploy(pair, "r1"))
    assert text(answer) == expected("completion", BODY, "fastdeploy-decode", proof.proof.encode())


def test_a_decode_that_got_another_prompt_is_an_error(pairs: Callable[[str], Pair]) -> None:
    for pair, body in (
        (pairs("sglang"), sglang(pairs("sglang"), 7)),
        (pairs("fastdeploy"), fastdeploy(pairs("fastdeploy"), "r2")),
    ):
        assert pair.both(body, {**body, "prompt": "Hello thera"})[0] == 400


@pytest.mark.parametrize("missing", ["bootstrap_host", "bootstrap_port", "bootstrap_room"])
def test_sglang_needs_all_three_keys(pairs: Callable[[str], Pair], missing: str) -> None:
    pair = pairs("sglang")
    body = {k: v for k, v in sglang(pair, 1).items() if k != missing}
    assert [e.call("/v1/completions", body)[0] for e in (pair.prefill, pair.decode)] == [400, 400]


@pytest.mark.parametrize("key", ["decode_rdma_ports", "decode_ip", "decode_tp_size", "transfer_protocol"])
def test_fastdeploy_needs_every_key(pairs: Callable[[str], Pair], key: str) -> None:
    pair = pairs("fastdeploy")
    body = fastdeploy(pair, "r3")
    del body["disaggregate_info"][key]
    assert [e.call("/v1/completions", body)[0] for e in (pair.prefill, pair.decode)] == [400, 400]


def test_fastdeploy_decode_refuses_what_is_meant_for_another(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("fastdeploy")
    body = fastdeploy(pair, "r4")
    body["disaggregate_info"]["decode_connector_port"] = pair.prefill.port
    assert pair.decode.call("/v1/completions", body)[0] == 400
