"""`POST /v1/abort_requests`: whom it reaches in either mode, and one answer out of all."""

from __future__ import annotations

import json
import threading

import pytest

from tests.blackbox import engine as scripts
from tests.blackbox.router import Router, chat
from tests.blackbox.test_mixed import read_until
from tests.support.waiting import until

ABORT = "/v1/abort_requests"


@pytest.mark.parametrize("body", [{}, {"req_ids": []}, {"abort_all": False}, {"req_ids": None, "abort_all": None}])
def test_an_abort_of_nothing_is_refused_in_the_engines_words(mixed: Router, body: dict[str, object]) -> None:
    engine = mixed.engine()
    answer = mixed.post(ABORT, body)
    assert (answer.status, answer.body) == (400, b'{"error":"must provide abort_all=true or req_ids"}')
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert engine.asked == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"req_ids": 5}', b'{"req_ids": [5]}'])
def test_what_cannot_be_read_reaches_nobody(mixed: Router, body: bytes) -> None:
    engine = mixed.engine()
    answer = mixed.post(ABORT, body)
    assert answer.status == 400
    assert list(answer.json()) == ["error"]
    assert engine.asked == []


@pytest.mark.parametrize("body", [b'{ "req_ids":["a", "b"] }', b'{"abort_all": true, "more": 1.10}'])
def test_every_mixed_instance_is_told_once_with_the_clients_bytes(mixed: Router, body: bytes) -> None:
    engines = [mixed.engine() for _ in range(3)]
    assert mixed.post(ABORT, body).status == 200
    for engine in engines:
        assert [(asked.path, asked.body) for asked in engine.asked] == [(ABORT, body)]


def test_answers_are_merged_and_failures_named(mixed: Router) -> None:
    well, other, ill = (mixed.engine() for _ in range(3))
    for engine, name, tokens in ((well, "a", 3), (other, "b", 0)):
        result = {"aborted": [{"request_id": name, "output_token_count": tokens}], "not_found": ["x"]}
        engine.script = scripts.refuse(200, json.dumps({"result": result}).encode())
    ill.script = scripts.refuse(500)
    found = mixed.post(ABORT, {"req_ids": ["a", "b", "c"]}).json()
    aborted = {entry["request_id"]: entry["output_token_count"] for entry in found["result"]["aborted"]}
    assert aborted == {"a": 3, "b": 0}, found
    assert found["result"]["not_found"] == ["c"], found
    assert [failure["server"] for failure in found["errors"]] == [ill.url], found


def test_an_engine_that_only_says_yes_has_its_streams_ended(mixed: Router) -> None:
    """Later engines answer nothing; the router ends what is left, and says how many tokens there were."""
    engine = mixed.engine()
    engine.script = lambda handler: (
        scripts.refuse(200, b"")(handler) if handler.path == ABORT else scripts.endless(handler)
    )
    with mixed.open("/v1/chat/completions", chat(stream=True)) as connection:
        read_until(connection, b"data: 1")
        found: list[int] = []
        aborting = threading.Thread(target=lambda: found.append(mixed.post(ABORT, {"abort_all": True}).status))
        aborting.start()
        said = read_until(connection, b"0\r\n\r\n")
        aborting.join()
    assert found == [200]
    assert b'"error"' in said
    assert b"[DONE]" not in said
    until(lambda: engine.cut, "the engine to see the end")


def test_a_pairs_request_is_ended_at_both_halves_by_its_name(pairs: Router) -> None:
    prefiller, decoder = pairs.engine("prefill"), pairs.engine("decode")
    for engine in (prefiller, decoder):
        engine.script = lambda handler: (
            scripts.refuse(404)(handler) if handler.path == ABORT else scripts.endless(handler)
        )
    with pairs.open("/v1/chat/completions", chat(stream=True, request_id="mine")) as connection:
        read_until(connection, b"data: 1")
        found = pairs.post(ABORT, {"req_ids": ["chatcmpl-mine", "other"]}).json()
        assert [entry["request_id"] for entry in found["result"]["aborted"]] == ["chatcmpl-mine"], found
        assert found["result"]["not_found"] == ["other"], found
        read_until(connection, b"0\r\n\r\n")
    until(lambda: prefiller.cut and decoder.cut, "both to see the end")
