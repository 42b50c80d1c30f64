"""One request at two instances in turns: decode is asked with what prefill answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.config import Timeouts
from broker.errors import BadRequest, UpstreamBroken, UpstreamTimeout
from broker.types import EngineKind
from frontend.paircall import MAX_PREFILL_ANSWER
from tests.frontend.pairs import ANSWER, BODY, GIVEN, PairFrontend, failed, held


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[PairFrontend]:
    """Sequential: vLLM with NIXL."""
    with PairFrontend(tmp_path, EngineKind.VLLM, timeouts=Timeouts(first_byte_secs=30.0)) as it:
        yield it


def test_decode_is_asked_with_prefills_answer_and_not_before(turns: PairFrontend) -> None:
    turns.pair()
    assert turns.legs("d") == []
    assert held(turns) == (1, 1)
    sent = json.loads(turns.prefill.request.body)
    assert (sent["max_tokens"], sent["stream"]) == (1, False)
    assert turns.prefill.request.stream is False
    turns.prefill.sink.start(200, [])
    turns.prefill.sink.write(ANSWER[:20])
    turns.prefill.sink.write(ANSWER[20:])
    assert turns.legs("d") == []
    turns.prefill.sink.finish()
    assert turns.decode.request.body == BODY[:-1] + b',"kv_transfer_params":' + GIVEN + b"}"
    assert turns.decode.request.stream is True
    assert held(turns) == (0, 1)
    turns.decode.answer(b"text")
    assert turns.client.heard == [200, b"text", "end"]
    assert held(turns) == (0, 0)


@pytest.mark.parametrize("answer", [b"", b"{}", b"no", b'{"kv_transfer_params":null}', b'{"kv_transfer_params":1}'])
def test_an_answer_without_the_object_is_a_failure_of_prefill(turns: PairFrontend, answer: bytes) -> None:
    turns.pair()
    first = turns.prefill.instance
    for _ in range(3):
        turns.prefill.answer(*([answer] if answer else []))
    assert turns.legs("d") == []
    assert turns.legs("p")[1].instance != first
    assert isinstance(failed(turns), UpstreamBroken)
    assert held(turns) == (0, 0)


def test_what_prefill_answers_is_bounded(turns: PairFrontend) -> None:
    turns.pair()
    prefill = turns.prefill
    prefill.sink.start(200, [])
    prefill.sink.write(b"x" * (MAX_PREFILL_ANSWER + 1))
    assert prefill.cancelled


@pytest.mark.parametrize("status", [400, 404, 429])
def test_a_refusal_by_prefill_is_the_answer(turns: PairFrontend, status: int) -> None:
    turns.pair()
    turns.prefill.answer(b"no", status=status)
    assert turns.client.heard == [status, b"no", "end"]
    assert turns.legs("d") == []
    assert held(turns) == (0, 0)


@pytest.mark.parametrize("how", ["fails", "500", "503"])
def test_decodes_failure_begins_with_prefill_again(turns: PairFrontend, how: str) -> None:
    turns.pair()
    turns.prefill.answer(ANSWER)
    first = turns.decode.instance
    if how == "fails":
        turns.decode.sink.fail(UpstreamBroken("gone"))
    else:
        turns.decode.sink.start(int(how), [])
    assert len(turns.legs("p")) == 2
    assert turns.client.heard == []
    turns.prefill.answer(ANSWER)
    assert turns.decode.instance != first
    turns.decode.answer(b"text")
    assert turns.client.heard == [200, b"text", "end"]
    assert held(turns) == (0, 0)


def test_the_last_refusal_by_decode_passes_through(turns: PairFrontend) -> None:
    turns.pair()
    for attempt in range(3):
        turns.prefill.answer(ANSWER)
        turns.decode.sink.start(500, [])
        assert turns.decode.cancelled is False if attempt == 2 else len(turns.legs("p")) == attempt + 2
    turns.decode.sink.write(b"broken")
    turns.decode.sink.finish()
    assert turns.client.heard == [500, b"broken", "end"]
    assert held(turns) == (0, 0)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_client_that_leaves_ends_the_leg_under_way(turns: PairFrontend, stage: str) -> None:
    forward = turns.pair()
    if stage == "decode":
        turns.prefill.answer(ANSWER)
    forward.cancel()
    assert (turns.prefill if stage == "prefill" else turns.decode).cancelled
    assert len(turns.legs("d")) == (stage == "decode")
    assert held(turns) == (0, 0)


def test_a_prefill_that_hangs_is_the_one_to_blame(turns: PairFrontend) -> None:
    turns.pair()
    prefill = turns.prefill
    turns.time.advance(31)
    assert isinstance(failed(turns), UpstreamTimeout)
    assert prefill.cancelled
    assert turns.breaker.failures(turns.slots[prefill.instance.url]) == 1
    assert held(turns) == (0, 0)


def test_a_client_that_was_slow_during_prefill_finds_decode_paused(turns: PairFrontend) -> None:
    turns.pair().pause()
    assert not turns.prefill.paused
    turns.prefill.answer(ANSWER)
    assert turns.decode.paused


def test_what_a_connector_cannot_carry_is_refused_and_nothing_sent(turns: PairFrontend) -> None:
    turns.pair(body=b'{"model":"tiny","prompt":["a","b"]}')
    assert turns.client.heard == []
    turns.time.advance(0)
    assert isinstance(failed(turns), BadRequest)
    assert turns.http.calls == []
    assert held(turns) == (0, 0)
