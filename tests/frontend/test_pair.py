"""One request at two instances: who is asked when, what ends what, what is held and for how long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.config import Timeouts
from broker.counters import CounterColumn
from broker.errors import BadRequest, ConnectFailed, PenstockError, UpstreamBroken, UpstreamTimeout
from broker.table import State
from broker.types import Connector, EngineKind, FastDeployFields, PairFields, Role, RouteRequest
from frontend.held import MOST_BYTES
from frontend.pair import Terms
from frontend.paircall import MAX_PREFILL_ANSWER
from tests.frontend.fakes import FakeCall
from tests.frontend.pairs import BODY, PairFrontend

GIVEN = b'{"do_remote_prefill": true, "remote_block_ids":[[ 1,2]], "remote_port":9007199254740993}'
ANSWER = b'{"id":"x", "kv_transfer_params": ' + GIVEN + b', "usage":null}'


@pytest.fixture
def both(tmp_path: Path) -> Iterator[PairFrontend]:
    """Concurrent: FastDeploy."""
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, timeouts=Timeouts(first_byte_secs=30.0)) as it:
        yield it


@pytest.fixture
def turns(tmp_path: Path) -> Iterator[PairFrontend]:
    """Sequential: vLLM with NIXL."""
    with PairFrontend(tmp_path, EngineKind.VLLM, timeouts=Timeouts(first_byte_secs=30.0)) as it:
        yield it


def held(frontend: PairFrontend) -> tuple[int, int]:
    return frontend.held("p"), frontend.held("d")


def failed(frontend: PairFrontend) -> PenstockError:
    (error,) = frontend.client.heard
    assert isinstance(error, PenstockError)
    return error


# -- concurrent ------------------------------------------------------------------------------------------------


def test_both_are_asked_at_once_with_the_same_bytes(both: PairFrontend) -> None:
    both.pair()
    assert both.prefill.request == both.decode.request
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


# -- sequential ------------------------------------------------------------------------------------------------


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


# -- who makes a pair ------------------------------------------------------------------------------------------


def test_pairs_are_of_one_connector(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.VLLM, 1, 0) as it:
        it.admit("http://d0:80", Role.DECODE, engine=EngineKind.SGLANG)
        it.pair()
        assert "fits" in failed(it).message
        assert held(it) == (0, 0)
        it.admit("http://d1:80", Role.DECODE)
        for _ in range(8):
            it.pair(sink=type(it.client)())
            assert it.prefill.instance.url == "http://p0:80"
            it.prefill.answer(ANSWER)
            assert it.decode.instance.url == "http://d1:80"
        mooncake = PairFields(connector=Connector.MOONCAKE)
        it.admit("http://p1:80", Role.PREFILL, pair=mooncake)
        it.pair(sink=type(it.client)())
        assert it.prefill.instance.url == "http://p0:80"  # nobody would decode for the other one, idle as it is


def test_pairs_are_of_one_size_or_decode_has_one_device(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 0, 0) as it:
        it.admit("http://p0:80", Role.PREFILL, fastdeploy=FastDeployFields(tp_size=1))
        it.admit("http://d0:80", Role.DECODE, fastdeploy=FastDeployFields(tp_size=2))
        it.pair()
        assert "fits" in failed(it).message
        it.admit("http://p1:80", Role.PREFILL, fastdeploy=FastDeployFields(tp_size=2))
        it.pair(sink=type(it.client)())
        assert it.prefill.instance.url == "http://p1:80"


def test_pairs_have_a_model_in_common_also_when_none_is_asked_for(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 0, 0) as it:
        it.admit("http://p0:80", Role.PREFILL, models=("a",))
        it.admit("http://p1:80", Role.PREFILL, models=("b",))
        it.admit("http://d1:80", Role.DECODE, models=("b", "tiny"))
        for _ in range(4):
            choice = it.forwarder.dispatcher.choose(RouteRequest(), (), 0.0)
            assert choice.where == "http://p1:80,http://d1:80"


def test_without_a_decode_nothing_is_held(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 1, 1) as it:
        it.run.writer.set_state(it.slots["http://d0:80"], State.DOWN)
        it.pair()
        assert failed(it).status == 503
        assert held(it) == (0, 0)


def test_a_single_pair_is_tried_again(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 1, 1) as it:
        it.pair()
        calls: list[FakeCall] = it.http.calls
        calls[0].sink.fail(ConnectFailed("refused"))
        assert len(calls) == 4
        calls[2].answer(b"")
        calls[3].answer(b"text")
        assert it.client.heard == [200, b"text", "end"]


# -- terms -----------------------------------------------------------------------------------------------------


def test_decodes_answer_may_have_to_wait_for_prefills_status(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 2, 2, Terms(awaits_prefill_s=2.0)) as it:
        it.pair()
        it.decode.sink.start(200, [])
        assert it.decode.paused
        dead = it.prefill
        dead.sink.fail(UpstreamBroken("gone"))
        assert it.decode.instance != dead.instance
        it.decode.sink.start(200, [])
        it.time.advance(1.9)
        assert it.decode.paused
        it.prefill.sink.start(200, [])
        it.decode.sink.write(b"text")
        it.decode.sink.finish()
        assert it.client.heard == [200, b"text", "end"]


def test_a_prefill_that_never_says_anything_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 2, 2, Terms(awaits_prefill_s=2.0)) as it:
        it.pair()
        it.time.advance(1.5)
        it.decode.sink.start(200, [])
        it.time.advance(0.6)
        assert not it.decode.paused
        it.decode.sink.write(b"text")
        assert it.client.heard == [200, b"text"]


def test_a_single_pair_may_be_asked_once_only(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 1, 2, Terms(repeats=False)) as it:
        it.pair()
        it.decode.sink.fail(ConnectFailed("refused"))  # there is another decode
        it.prefill.sink.fail(ConnectFailed("refused"))
        assert isinstance(failed(it), ConnectFailed)
        assert (len(it.legs("p")), len(it.legs("d"))) == (2, 2)
        assert held(it) == (0, 0)


@pytest.mark.parametrize(
    ("terms", "until", "blamed"),
    [
        (Terms(prefill_s=5.0), "sent", "http://p0:80"),
        (Terms(decode_s=5.0), "prefilled", "http://d0:80"),
        (Terms(whole_s=5.0), "answering", "http://d0:80"),
    ],
)
def test_each_stage_has_a_limit(tmp_path: Path, terms: Terms, until: str, blamed: str) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 1, 1, terms) as it:
        it.pair()
        if until != "sent":
            it.prefill.sink.start(200, [])
            it.prefill.sink.write(b"x")
        if until == "answering":
            it.decode.sink.start(200, [])
            it.decode.sink.write(b"x")
        it.time.advance(4.9)
        assert it.forwarder.live
        it.time.advance(0.2)
        assert isinstance(it.client.heard[-1], UpstreamTimeout)
        assert {url for url, slot in it.slots.items() if it.breaker.failures(slot)} == {blamed}
        assert held(it) == (0, 0)
        assert it.time.pending == 0


def test_a_stage_that_ends_in_time_is_not_limited_any_more(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.VLLM, 1, 1, Terms(prefill_s=5.0, decode_s=5.0)) as it:
        it.pair()
        it.time.advance(4.0)
        it.prefill.answer(ANSWER)
        it.time.advance(4.0)
        it.decode.sink.start(200, [])
        it.decode.sink.write(b"x")
        it.time.advance(60.0)
        it.decode.sink.finish()
        assert it.client.heard == [200, b"x", "end"]
