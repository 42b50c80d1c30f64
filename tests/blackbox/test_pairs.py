"""Sections 4.3 and 4.4: prefill/decode pairs of FastDeploy engines."""

from __future__ import annotations

import json
import threading
import uuid
from typing import Any

import pytest

from tests.blackbox import engine as scripts
from tests.blackbox.engine import Engine, Handler
from tests.blackbox.router import Router, chat
from tests.blackbox.test_mixed import read_until
from tests.support.waiting import until

CHAT = "/v1/chat/completions"
FULL = {"transfer_protocol": ["ipc", "rdma"], "connector_port": 8001, "rdma_ports": [7100, "7101"]}


def pair(router: Router, prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None) -> list[Engine]:
    return [router.engine("prefill", **(prefill or {})), router.engine("decode", **(decode or {}))]


def test_without_a_pair_the_router_says_so_with_the_requests_id(pairs: Router) -> None:
    expected = b'{"error": "No available prefill/decode workers", "request_id": "r<1>"}'.replace(b"<", b"\\u003c")
    for missing in ("both", "decode"):
        if missing == "decode":
            pairs.engine("prefill")
        answer = pairs.chat(request_id="r<1>")
        assert (answer.status, answer.body) == (503, expected.replace(b">", b"\\u003e"))
        assert answer.headers["content-type"].startswith("application/json")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "unexpected end of JSON input"),
        (b"[]", "json: cannot unmarshal array into Go value of type map[string]interface {}"),
        (b"null", "the body is not a JSON object"),
        (b'{"request_id": 5}', "'request_id' must be a string"),
    ],
)
def test_what_no_pair_can_be_asked_is_refused(pairs: Router, body: bytes, said: str) -> None:
    """The original panicked at the last two."""
    engines = pair(pairs)
    answer = pairs.post(CHAT, body)
    assert (answer.status, answer.json()) == (400, {"error": f"Invalid JSON format: {said}"})
    assert not any(engine.asked for engine in engines)


@pytest.mark.parametrize(
    ("prefill", "decode", "expected"),
    [
        ({}, {}, {"decode_device_ids": None, "decode_rdma_ports": None, "transfer_protocol": "rdma"}),
        (FULL, FULL, {"prefill_connector_port": 8001, "decode_connector_port": 8001, "transfer_protocol": "ipc"}),
        (FULL, {**FULL, "transfer_protocol": ["rdma"]}, {"transfer_protocol": "rdma"}),
        ({**FULL, "tp_size": 2}, {**FULL, "tp_size": 2}, {"transfer_protocol": "ipc", "decode_tp_size": 2}),
        ({**FULL, "device_ids": [0, 1]}, {**FULL, "tp_size": 2}, {"transfer_protocol": "ipc", "decode_tp_size": 2}),
        ({"connector_port": None}, {"device_ids": [3]}, {"prefill_connector_port": 0, "decode_device_ids": ["3"]}),
    ],
)
def test_disaggregate_info_is_made_of_both_registrations(
    pairs: Router, prefill: dict[str, Any], decode: dict[str, Any], expected: dict[str, Any]
) -> None:
    prefiller, decoder = pair(pairs, prefill, decode)
    assert pairs.chat(disaggregate_info={"mine": 1}).status == 200
    until(lambda: prefiller.asked and decoder.asked, "both to be asked")
    info = prefiller.asked[0].json()["disaggregate_info"]
    assert info == decoder.asked[0].json()["disaggregate_info"]
    assert (info["prefill_ip"], info["decode_ip"]) == ("127.0.0.1", "127.0.0.1")
    assert set(info) == {
        "prefill_ip",
        "decode_ip",
        "prefill_connector_port",
        "decode_connector_port",
        "decode_device_ids",
        "decode_rdma_ports",
        "transfer_protocol",
        "decode_tp_size",
    }
    assert {key: info[key] for key in expected} == expected


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_both_get_the_same_bytes_with_the_clients_numbers_and_the_same_id(pairs: Router, path: str) -> None:
    """The original sent every number through 64-bit floats."""
    prefiller, decoder = pair(pairs)
    body = b'{ "seed": 12345678901234567890, "top_p":1.10, "messages" : [] }'
    answer = pairs.post(path, body, {"Authorization": "Bearer x"})
    assert answer.json()["from"] == decoder.port
    until(lambda: prefiller.asked and decoder.asked, "both to be asked")
    one, other = prefiller.asked[0], decoder.asked[0]
    assert (one.path, one.body) == (path, other.body) == (other.path, other.body)
    assert one.header("authorization") == other.header("authorization") == "Bearer x"
    assert b'"seed": 12345678901234567890, "top_p":1.10, "messages" : []' in one.body
    assert uuid.UUID(one.json()["request_id"]).version == 4


def test_both_are_asked_at_once(pairs: Router) -> None:
    """Each answers when the other has been asked."""
    prefiller, decoder = pair(pairs)

    def after(other: Engine) -> scripts.Script:
        def script(handler: Handler) -> None:
            until(lambda: other.asked, "the other to be asked")
            scripts.answer(handler)

        return script

    prefiller.script, decoder.script = after(decoder), after(prefiller)
    assert pairs.chat().json()["from"] == decoder.port


@pytest.mark.parametrize("name", ["mine", ""])
def test_the_clients_request_id_is_kept(pairs: Router, name: str) -> None:
    prefiller, decoder = pair(pairs)
    assert pairs.chat(request_id=name).status == 200
    until(lambda: prefiller.asked and decoder.asked, "both to be asked")
    assert {engine.asked[0].json()["request_id"] for engine in (prefiller, decoder)} == {name}


def test_the_answer_names_the_pair_and_is_decodes(pairs: Router) -> None:
    prefiller, decoder = pair(pairs)
    decoder.script = scripts.stream([b"data: from decode\n\n", b"data: [DONE]\n\n"])
    prefiller.script = scripts.stream([b"data: from prefill\n\n"])
    answer = pairs.chat(stream=True)
    assert answer.body == b"data: from decode\n\ndata: [DONE]\n\n"
    named = dict(answer.raw_headers)
    assert named["X-Router-Prefill-Url"] == prefiller.url
    assert named["X-Router-Decode-Url"] == decoder.url


@pytest.mark.parametrize("leg", ["prefill", "decode"])
@pytest.mark.parametrize("meanwhile", ["hangs", "answers"])
def test_a_dead_leg_is_said_at_once_and_the_other_is_given_up(pairs: Router, leg: str, meanwhile: str) -> None:
    """The original noticed it only when the other leg answered. Nobody is asked twice."""
    prefiller, decoder = pair(pairs)
    broken, other = (prefiller, decoder) if leg == "prefill" else (decoder, prefiller)
    broken.script, other.script = scripts.reset, scripts.hang if meanwhile == "hangs" else scripts.answer
    answer = pairs.chat(request_id="r1")
    assert answer.status == 502
    assert answer.json()["error"].startswith("Failed to connect to backend service: ")
    assert answer.json()["request_id"] == "r1"
    assert dict(answer.raw_headers)["X-Router-Prefill-Url"] == prefiller.url
    assert len(broken.asked) == 1
    assert len(other.asked) <= 1  # it may have been given up before it was asked
    if meanwhile == "hangs":
        until(lambda: len(other.cut) == len(other.asked), lambda: f"given up: {other}")
    own = r"\[ERROR\] .*: \[request_id:r1\] "
    pairs.await_line(rf"{own}{leg.capitalize()} request failed for {broken.url}: .+", "err")
    pairs.await_line(rf"{own}Failed to connect to backend service: .+", "err")
    released = rf"\[INFO\] .*: \[request_id:r1\] release worker: {prefiller.url}, count: 0"
    pairs.await_line(released, "out")
    until(lambda: sum(pairs_in_flight(pairs)) == 0, "nothing in flight")


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_a_leg_that_nobody_listens_at_is_a_502(pairs: Router, leg: str) -> None:
    prefiller, decoder = pair(pairs)
    dead = prefiller if leg == "prefill" else decoder
    dead.close()
    answer = pairs.chat(request_id="r2")
    assert (answer.status, answer.json()["request_id"]) == (502, "r2")
    assert answer.json()["error"].startswith("Failed to connect to backend service: ")
    pairs.engines.remove(dead)


def test_another_pair_is_tried_where_there_is_one(pairs: Router) -> None:
    """The original stayed with the pair that had failed. Engines are asked under another name the second time."""
    broken, (well, decoder) = pairs.engine("prefill"), pair(pairs)
    broken.script = scripts.reset
    names: set[str] = set()
    for _ in range(8):
        assert pairs.chat(request_id="r3").status == 200
    names = {asked.json()["request_id"] for engine in (well, decoder) for asked in engine.asked}
    assert broken.asked
    assert names == {"r3", "r3-retry1"}


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_begins_when_both_have_their_headers(pairs: Router, stream: bool) -> None:
    prefiller, decoder = pair(pairs)
    go, said = threading.Event(), []

    def prefill(handler: Handler) -> None:
        if handler.until_cut(go):
            said.append("prefill")
            handler.reply(200, b"{}")

    prefiller.script = prefill
    threading.Timer(0.5, go.set).start()
    answer = pairs.chat(stream=stream)
    assert answer.json()["from"] == decoder.port
    assert said


def test_what_decode_gives_back_is_started_anew_elsewhere(pairs: Router) -> None:
    """As FastDeploy's Python router does; a stream has begun and ends as the engine ends it."""
    _, full = pair(pairs)
    given_back = b'{"choices":[{"finish_reason":"pd_reschedule"}]}'
    full.script = scripts.refuse(200, given_back)
    answer = pairs.chat()
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    roomy = pairs.engine("decode")
    assert {pairs.chat().json()["from"] for _ in range(6)} == {roomy.port}


@pytest.mark.parametrize("leg", ["prefill", "decode"])
def test_a_refusal_of_either_leg_is_the_answer(pairs: Router, leg: str) -> None:
    """The original ignored prefill's, and waited for a decode that could never begin."""
    prefiller, decoder = pair(pairs)
    refusing, other = (prefiller, decoder) if leg == "prefill" else (decoder, prefiller)
    refusing.script, other.script = scripts.refuse(429, b'{"error": "full"}'), scripts.hang
    answer = pairs.chat()
    assert (answer.status, answer.body) == (429, b'{"error": "full"}')
    until(lambda: len(other.cut) == len(other.asked), lambda: f"given up: {other}")


def test_a_client_that_leaves_is_seen_by_both(pairs: Router) -> None:
    prefiller, decoder = pair(pairs)
    prefiller.script, decoder.script = scripts.hang, scripts.endless
    with pairs.open(CHAT, chat(stream=True)) as connection:
        read_until(connection, b"data: 1")
    until(lambda: prefiller.cut and decoder.cut, "both to see it")  # silent: nothing but the client can end this
    until(lambda: sum(pairs_in_flight(pairs)) == 0, "nothing in flight")


def test_prefill_is_released_at_its_first_chunk_and_decode_at_the_end(pairs: Router) -> None:
    prefiller, decoder = pair(pairs)
    first, last = threading.Event(), threading.Event()

    def prefill(handler: Handler) -> None:
        handler.start_stream()
        if handler.until_cut(first):
            handler.chunk(b"data: 1\n\n")
            handler.until_cut()

    def decode(handler: Handler) -> None:
        handler.start_stream()
        if handler.until_cut(last):
            handler.chunk(b"data: [DONE]\n\n")
            handler.end_stream()

    prefiller.script, decoder.script = prefill, decode
    with pairs.open(CHAT, chat("four", stream=True, request_id="p1")) as connection:
        own = r"\[INFO\] .*: \[request_id:p1\] "
        pairs.await_line(rf"{own}select worker \(prefill\): {prefiller.url}, tokens: 8", "out")
        pairs.await_line(rf"{own}select worker \(decode\): {decoder.url}, count: 1", "out")
        until(lambda: pairs_in_flight(pairs) == [1, 1], "both in flight")
        first.set()
        pairs.await_line(rf"{own}\[prefill\] first chunk received, release counter url={prefiller.url}", "out")
        pairs.await_line(rf"{own}release prefill tokens: {prefiller.url}, tokens: 0", "out")
        assert sorted(pairs_in_flight(pairs)) == [0, 1]
        last.set()
        assert b"[DONE]" in read_until(connection, b"0\r\n\r\n")
    pairs.await_line(rf"{own}release worker: {decoder.url}, count: 0", "out")
    for line in (
        "before SelectWorker prefill",
        "before SelectWorker decode, after prefill",
        "after SelectWorker decode, before return",
    ):
        pairs.await_line(rf"{own}{line}\. ts_ms=\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{{3}}", "out")


def test_an_abort_reaches_every_instance_once_with_the_clients_bytes(pairs: Router) -> None:
    prefiller, decoder = pair(pairs)
    found = {"result": {"aborted": [{"request_id": "a", "output_token_count": 3}], "not_found": ["b"]}}
    for engine in (prefiller, decoder):
        engine.script = scripts.refuse(200, json.dumps(found).encode())
    body = b'{ "req_ids":["a", "b"] }'
    answer = pairs.post("/v1/abort_requests", body)
    assert answer.status == 200
    for engine in (prefiller, decoder):
        assert [(asked.path, asked.body) for asked in engine.asked] == [("/v1/abort_requests", body)]
    assert "a" in answer.body.decode()
    prefiller.script = scripts.refuse(500)
    assert prefiller.url in pairs.post("/v1/abort_requests", {"abort_all": True}).body.decode()


def pairs_in_flight(router: Router) -> list[int]:
    return [row["in_flight"] for row in router.get("/instances").json()["instances"]]
