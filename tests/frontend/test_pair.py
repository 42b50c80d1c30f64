"""One request at two instances at once: who is asked when, what ends what, what is held and for how long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.config import Timeouts
from broker.counters import CounterColumn
from broker.errors import ConnectFailed, UpstreamBroken, UpstreamTimeout
from broker.types import EngineKind
from frontend.held import MOST_BYTES
from tests.frontend.pairs import BODY, PairFrontend, failed, held


@pytest.fixture
def both(tmp_path: Path) -> Iterator[PairFrontend]:
    """Concurrent: FastDeploy."""
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, timeouts=Timeouts(first_byte_secs=30.0)) as it:
        yield it


def test_both_are_asked_at_once_with_the_same_bytes(both: PairFrontend) -> None:
    both.pair()
    prefill, decode = both.prefill.request, both.decode.request
    assert (prefill.path, prefill.headers, prefill.body) == (decode.path, decode.headers, decode.body)
    body = both.decode.request.body
    assert body.startswith(BODY[:-1])
    assert json.loads(body)["request_id"] == "r-1"
    assert json.loads(body)["disaggregate_info"]["prefill_ip"] == both.prefill.instance.url[7:9]
    assert held(both) == (1, 1)
    assert (both.held_tokens("p"), both.held_tokens("d")) == (10, 0)


def test_decodes_answer_is_the_clients_and_names_both(both: PairFrontend) -> None:
    heard: list[object] = []
    both.client.start = lambda status, headers: heard.append(dict(headers))  # type: ignore[method-assign]  # listens
    both.pair()
    both.prefill.answer(b"first token")
    both.decode.answer(b"the ", b"text")
    assert both.client.heard == [b"the ", b"text", "end"]
    urls = both.prefill.instance.url.encode(), both.decode.instance.url.encode()
    assert heard == [{b"X-Router-Prefill-Url": urls[0], b"X-Router-Decode-Url": urls[1]}]
    assert held(both) == (0, 0)


def test_prefill_is_done_with_its_first_chunk_when_streaming(both: PairFrontend) -> None:
    both.pair(stream=True)
    both.prefill.sink.start(200, [])
    assert held(both) == (1, 1)
    both.prefill.sink.write(b"token")
    assert held(both) == (0, 1)
    both.decode.answer(b"x")
    assert both.prefill.cancelled
    assert held(both) == (0, 0)


def test_prefill_is_done_with_its_last_byte_when_not_streaming(both: PairFrontend) -> None:
    both.pair(stream=False)
    both.prefill.sink.start(200, [])
    both.prefill.sink.write(b"{")
    assert held(both) == (1, 1)
    both.prefill.sink.finish()
    assert held(both) == (0, 1)


def test_a_prefill_that_never_answers_holds_nothing_up(both: PairFrontend) -> None:
    both.pair()
    both.decode.sink.start(200, [])
    assert held(both) == (1, 1)
    both.decode.sink.write(b"x")
    assert held(both) == (0, 1)
    both.decode.sink.finish()
    assert both.client.heard == [200, b"x", "end"]
    assert both.prefill.cancelled


def test_prefills_end_is_of_no_concern_once_decode_answers(both: PairFrontend) -> None:
    both.pair()
    both.decode.sink.start(200, [])
    both.decode.sink.write(b"x")
    both.prefill.sink.fail(UpstreamBroken("gone"))
    both.decode.sink.finish()
    assert both.client.heard == [200, b"x", "end"]


@pytest.mark.parametrize("status", [400, 429, 500])
def test_a_refusal_by_prefill_is_the_answer_and_ends_decode(both: PairFrontend, status: int) -> None:
    both.pair()
    decode = both.decode
    both.prefill.sink.start(status, [])
    assert decode.cancelled
    both.prefill.sink.write(b"no")
    both.prefill.sink.finish()
    assert both.client.heard == [status, b"no", "end"]
    assert held(both) == (0, 0)


@pytest.mark.parametrize("status", [400, 422, 429])
def test_a_refusal_by_decode_is_the_answer_and_ends_prefill(both: PairFrontend, status: int) -> None:
    both.pair()
    both.decode.sink.start(status, [])
    assert both.prefill.cancelled
    both.decode.sink.write(b"no")
    both.decode.sink.finish()
    assert both.client.heard == [status, b"no", "end"]
    assert held(both) == (0, 0)


@pytest.mark.parametrize("status", [500, 501])
def test_a_failure_of_decode_is_prefills_if_prefill_turns_out_to_be_dead(both: PairFrontend, status: int) -> None:
    """A killed prefill that is still offered: its decode answers before the refused connection is seen."""
    both.pair()
    prefill, decode = both.prefill, both.decode
    decode.sink.start(status, [])
    assert decode.paused
    assert not prefill.cancelled
    prefill.sink.fail(ConnectFailed("refused"))
    assert decode.cancelled
    assert both.prefill.instance != prefill.instance
    assert both.breaker.failures(both.slots[decode.instance.url]) == 0
    both.prefill.answer(b"{}")
    both.decode.answer(b"text")
    assert both.client.heard == [200, b"text", "end"]


@pytest.mark.parametrize("word", ["before", "after", "never"])
def test_a_failure_of_decode_passes_when_prefill_lives_or_says_nothing(both: PairFrontend, word: str) -> None:
    both.pair()
    if word == "before":
        both.prefill.sink.start(200, [])
    both.decode.sink.start(500, [])
    if word == "after":
        both.prefill.sink.start(200, [])
    elif word == "never":
        both.time.advance(0.05)
        assert not both.prefill.cancelled
        both.time.advance(0.06)
    assert both.prefill.cancelled
    assert not both.decode.paused
    both.decode.sink.write(b"no")
    both.decode.sink.finish()
    assert both.client.heard == [500, b"no", "end"]
    assert held(both) == (0, 0)


def test_a_failure_without_a_body_waits_as_well(both: PairFrontend) -> None:
    both.pair()
    both.decode.sink.start(500, [])
    both.decode.sink.finish()
    assert both.client.heard == []
    both.time.advance(0.2)
    assert both.client.heard == [500, "end"]


def test_a_slow_client_is_not_sent_what_was_kept_back(both: PairFrontend) -> None:
    forward = both.pair()
    both.decode.sink.start(500, [])
    forward.pause()
    forward.resume()
    assert both.decode.paused
    forward.pause()
    both.prefill.sink.start(200, [])
    assert both.decode.paused
    forward.resume()
    assert not both.decode.paused


def test_what_decode_gives_back_starts_anew_at_another_pair_under_another_name(both: PairFrontend) -> None:
    both.pair(stream=False)
    first = both.decode
    first.answer(b'{"choices":[{"finish_reason":', b'"pd_reschedule","text":"half"}]}')
    assert both.client.heard == []
    assert both.decode.instance != first.instance
    assert both.breaker.failures(both.slots[first.instance.url]) == 0  # full is not broken
    assert json.loads(both.decode.request.body)["request_id"] == "r-1-retry1"
    assert held(both) == (1, 1)
    both.decode.answer(b'{"choices":[{"finish_reason":"stop","text":"pd_reschedule"}]}')
    assert both.client.heard == [200, b'{"choices":[{"finish_reason":"stop","text":"pd_reschedule"}]}', "end"]
    assert held(both) == (0, 0)


def test_what_is_given_back_for_ever_is_an_error(both: PairFrontend) -> None:
    both.pair(stream=False)
    for _ in range(3):
        both.decode.answer(b'{"choices":[{"finish_reason":"pd_reschedule"}]}')
    assert (failed(both).status, failed(both).code) == (503, "given_back")


def test_a_large_answer_is_not_kept(both: PairFrontend) -> None:
    both.pair(stream=False)
    both.decode.sink.start(200, [])
    for _ in range(9):
        both.decode.sink.write(bytes(MOST_BYTES // 8))
    assert both.client.heard == [200, bytes(9 * (MOST_BYTES // 8))]
    both.decode.sink.write(b"more")
    both.decode.sink.finish()
    assert both.client.heard[2:] == [b"more", "end"]


@pytest.mark.parametrize("letter", ["p", "d"])
@pytest.mark.parametrize("how", ["fails", "502", "503"])
def test_a_leg_that_fails_ends_the_other_and_another_pair_is_tried(both: PairFrontend, letter: str, how: str) -> None:
    both.pair()
    first = {"p": both.prefill, "d": both.decode}
    if how == "fails":
        first[letter].sink.fail(ConnectFailed("refused"))
    else:
        first[letter].sink.start(int(how), [])
    other = first["d" if letter == "p" else "p"]
    assert other.cancelled
    second = {"p": both.prefill, "d": both.decode}
    assert second[letter].instance != first[letter].instance
    assert both.client.heard == []
    assert held(both) == (1, 1)
    assert both.counted_at(first[letter].instance.url, CounterColumn.RETRIED) == 1
    both.prefill.answer(b"{}")
    both.decode.answer(b"text")
    assert both.client.heard == [200, b"text", "end"]
    assert held(both) == (0, 0)


def test_only_who_failed_is_blamed(both: PairFrontend) -> None:
    both.pair()
    url = both.prefill.instance.url
    both.prefill.sink.fail(ConnectFailed("refused"))
    blamed = {slot for slot in both.slots.values() if both.breaker.failures(slot)}
    assert blamed == {both.slots[url]}


def test_attempts_are_counted_for_the_pair(both: PairFrontend) -> None:
    both.pair()
    for _ in range(3):
        both.decode.sink.fail(UpstreamBroken("gone"))
    assert len(both.legs("d")) == len(both.legs("p")) == 3
    error = failed(both)
    assert isinstance(error, UpstreamBroken)
    assert dict(error.headers)[b"X-Router-Decode-Url"] == both.decode.instance.url.encode()
    assert error.request_id == "r-1"
    assert all(call.cancelled for call in both.legs("p"))
    assert held(both) == (0, 0)


def test_a_failure_after_decodes_first_byte_is_said_and_ends_prefill(both: PairFrontend) -> None:
    both.pair()
    both.decode.sink.start(200, [])
    both.decode.sink.write(b"x")
    both.decode.sink.fail(UpstreamBroken("gone"))
    assert both.client.heard[:2] == [200, b"x"]
    assert isinstance(both.client.heard[2], UpstreamBroken)
    assert both.prefill.cancelled
    assert held(both) == (0, 0)


@pytest.mark.parametrize("when", ["before", "prefilled", "answering"])
def test_a_client_that_leaves_ends_both(both: PairFrontend, when: str) -> None:
    forward = both.pair()
    if when != "before":
        both.prefill.sink.start(200, [])
        both.prefill.sink.write(b"x")
    if when == "answering":
        both.decode.sink.start(200, [])
        both.decode.sink.write(b"x")
    forward.cancel()
    assert both.prefill.cancelled
    assert both.decode.cancelled
    assert held(both) == (0, 0)


def test_a_pair_that_hangs_ends_in_time(both: PairFrontend) -> None:
    both.pair()
    both.time.advance(31)
    assert isinstance(failed(both), UpstreamTimeout)
    assert both.prefill.cancelled
    assert both.decode.cancelled
    assert held(both) == (0, 0)


def test_a_slow_client_pauses_decode_alone(both: PairFrontend) -> None:
    forward = both.pair()
    forward.pause()
    assert (both.prefill.paused, both.decode.paused) == (False, True)
    forward.resume()
    assert not both.decode.paused
