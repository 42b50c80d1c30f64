"""One request on its way: every retry, every end, every cancel; the lease is closed exactly once each time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.config import Timeouts, Upstream
from broker.counters import CounterColumn, Histogram, TotalColumn, histogram_column
from broker.errors import (
    BadRequest,
    ClientTooSlow,
    ConnectFailed,
    EngineSaturated,
    ModelNotFound,
    NoInstance,
    PenstockError,
    UpstreamBroken,
    UpstreamTimeout,
)
from broker.faces import FD_ROUTER, PENSTOCK
from frontend.forward import Forward
from frontend.upstream.base import Headers
from tests.frontend.fakes import Client, Frontend

A, B, C, D = (f"http://10.0.0.{n}:80" for n in range(1, 5))


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Frontend]:
    with Frontend(tmp_path, A) as frontend:
        yield frontend


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Frontend]:
    with Frontend(tmp_path, A, B, C, D) as frontend:
        yield frontend


def idle(frontend: Frontend) -> bool:
    """Nothing is held: no lease, no timer, no request under way, no call that was not told."""
    return (
        not any(frontend.in_flight)
        and not frontend.time.pending
        and not frontend.forwarder.live
        and frontend.total(TotalColumn.STREAMS_OPENED) == frontend.total(TotalColumn.STREAMS_CLOSED)
    )


# -- answers -------------------------------------------------------------------------------------------------


def test_an_answer_passes_through_in_order(one: Frontend) -> None:
    one.begin()
    assert one.in_flight == [1]
    one.http.last.answer(b"a", b"b")
    assert one.client.heard == [200, b"a", b"b", "end"]
    assert idle(one)
    assert one.counted(CounterColumn.STATUS_200) == 1
    assert one.total(TotalColumn.RESPONSES_2XX) == 1


def test_headers_are_held_back_until_the_first_body_byte(one: Frontend) -> None:
    one.begin()
    one.http.last.sink.start(200, [])
    assert one.client.heard == []
    one.http.last.sink.write(b"x")
    assert one.client.heard == [200, b"x"]


def test_an_empty_answer_is_an_answer(one: Frontend) -> None:
    one.begin()
    one.http.last.answer(status=204)
    assert one.client.heard == [204, "end"]
    assert one.counted(CounterColumn.STATUS_204) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 504])
def test_what_an_engine_answers_is_passed_on_as_it_is(four: Frontend, status: int) -> None:
    four.begin()
    four.http.last.answer(b"its own words", status=status)
    assert four.client.heard == [status, b"its own words", "end"]
    assert len(four.http.calls) == 1
    assert idle(four)


def test_native_engines_are_reached_by_their_own_transport(one: Frontend) -> None:
    one.run.writer.remove(one.slots[A], one.run.clock())
    one.admit_native("ipc:///tmp/engine")
    one.begin()
    assert [call.instance.url for call in one.native.calls] == ["ipc:///tmp/engine"]
    assert one.http.calls == []


def test_the_log_line_says_where_and_how_but_never_what(one: Frontend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock.access")
    one.begin(model="tiny")
    one.time.advance(0.25)
    one.http.last.sink.start(200, [])
    one.http.last.sink.write(b'data: {"secret":1,"usage":{"prompt_tokens":3,"completion_tokens":42}}\n\n')
    one.time.advance(0.75)
    one.http.last.sink.write(b"data: [DONE]\n\n")
    one.http.last.sink.finish()
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == (
        f"id=id-1 path=/v1/chat/completions model=tiny instance={A} policy=request_num attempts=1 status=200 "
        "queue_ms=- stolen_from=- rescued_from=- ttft_ms=250.0 duration_ms=1000.0 bytes=85 tokens=42 outcome=done"
    )


def test_an_engines_address_is_for_the_log_and_not_for_the_client(
    one: Frontend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "penstock.access")
    one.begin()
    for _ in range(3):
        one.http.last.sink.fail(ConnectFailed(f'cannot connect to {A}: "refused"'))
    (error,) = one.client.heard
    assert A.encode() not in PENSTOCK.error(error).body
    assert b'"message":"the engine cannot be reached"' in PENSTOCK.error(error).body
    assert A.encode() in FD_ROUTER.error(error).body  # as the original has it
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith(f' outcome=failed reason="cannot connect to {A}: \\"refused\\""')


def test_a_model_name_cannot_forge_a_log_line(one: Frontend, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "penstock.access")
    one.begin(model="x\nid=other \x1b[31m")
    (line,) = (record.getMessage() for record in caplog.records)
    assert "model=x?id=other??[31m " in line


def test_times_are_counted(one: Frontend) -> None:
    one.begin()
    one.time.advance(0.02)
    one.http.last.sink.start(200, [])
    one.http.last.sink.write(b"x")
    one.time.advance(1)
    one.http.last.sink.finish()
    first, duration = histogram_column(Histogram.FIRST_TOKEN), histogram_column(Histogram.DURATION)
    assert one.counters.totals[first + 2] == 1  # up to 25 ms
    assert one.counters.totals[duration + 8] == 1  # up to 2.5 s


# -- before the first byte -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ConnectFailed("x"), UpstreamBroken("x"), EngineSaturated("x")])
def test_a_failure_before_the_first_byte_moves_to_another_instance(four: Frontend, error: PenstockError) -> None:
    four.begin()
    four.http.last.sink.fail(error)
    assert len(four.http.calls) == 2
    assert four.http.calls[0].instance.url != four.http.last.instance.url
    assert sum(four.in_flight) == 1
    four.http.last.answer(b"ok")
    assert four.client.heard == [200, b"ok", "end"]
    assert four.counted(CounterColumn.RETRIED) == 1
    assert four.counted(CounterColumn.STATUS_200) == 1
    assert idle(four)


@pytest.mark.parametrize("status", [502, 503])
def test_a_gateway_status_moves_to_another_instance_and_ends_the_first_call(four: Frontend, status: int) -> None:
    four.begin()
    first = four.http.last
    first.sink.start(status, [])
    assert first.cancelled
    four.http.last.answer(b"ok")
    assert four.client.heard == [200, b"ok", "end"]
    assert idle(four)


def test_an_engine_that_dies_right_after_its_headers_costs_the_client_nothing(four: Frontend) -> None:
    four.begin()
    four.http.last.sink.start(200, [(b"x-from", b"the dead")])
    four.http.last.sink.fail(UpstreamBroken("x"))
    four.http.last.answer(b"ok")
    assert four.client.heard == [200, b"ok", "end"]


def test_an_engine_that_ends_without_a_word_is_a_failure_too(four: Frontend) -> None:
    four.begin()
    four.http.last.sink.finish()
    four.http.last.answer(b"ok")
    assert four.client.heard == [200, b"ok", "end"]


def test_attempts_are_limited_and_all_on_different_instances(four: Frontend) -> None:
    four.begin()
    for _ in range(3):
        four.http.last.sink.fail(ConnectFailed("x"))
    assert len({call.instance.url for call in four.http.calls}) == 3
    assert isinstance(four.client.heard[0], ConnectFailed)
    assert len(four.client.heard) == 1
    assert idle(four)
    assert four.counted(CounterColumn.RETRIED) == 2
    assert four.counted(CounterColumn.STATUS_502) == 1
    assert four.total(TotalColumn.RESPONSES_5XX) == 1


def test_with_one_instance_the_same_is_tried_again(one: Frontend) -> None:
    one.begin()
    one.http.last.sink.fail(ConnectFailed("x"))
    one.http.last.sink.fail(ConnectFailed("x"))
    one.http.last.answer(b"ok")
    assert one.client.heard == [200, b"ok", "end"]
    assert len(one.http.calls) == 3


def test_the_last_attempts_answer_is_passed_on_whatever_it_is(one: Frontend) -> None:
    one.begin()
    for _ in range(2):
        one.http.last.sink.start(503, [])
    one.http.last.answer(b"really busy", status=503)
    assert one.client.heard == [503, b"really busy", "end"]
    assert one.counted(CounterColumn.STATUS_503) == 1


def test_an_engines_503_is_a_better_answer_than_no_instance(one: Frontend) -> None:
    one.begin()
    one.run.writer.remove(one.slots[A], one.run.clock())
    one.http.last.answer(b"stopping", status=503)
    assert one.client.heard == [503, b"stopping", "end"]
    assert not one.http.last.cancelled
    assert idle(one)


def test_with_one_attempt_nothing_is_repeated(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, B, upstream=Upstream(attempts=1)) as frontend:
        frontend.begin()
        frontend.http.last.sink.fail(ConnectFailed("x"))
        assert isinstance(frontend.client.heard[0], ConnectFailed)
        assert len(frontend.http.calls) == 1


@pytest.mark.parametrize("error", [UpstreamTimeout("x"), BadRequest("x")])
def test_what_cannot_be_retried_is_said_at_once(four: Frontend, error: PenstockError) -> None:
    four.begin()
    four.http.last.sink.fail(error)
    assert four.client.heard == [error]
    assert len(four.http.calls) == 1
    assert idle(four)


def test_without_an_instance_the_client_hears_it_and_nothing_is_held(tmp_path: Path) -> None:
    with Frontend(tmp_path) as frontend:
        frontend.begin()
        assert isinstance(frontend.client.heard[0], NoInstance)
        assert frontend.total(TotalColumn.NO_INSTANCE) == 1
        assert idle(frontend)


def test_a_model_that_nobody_serves_is_said(one: Frontend) -> None:
    one.begin(model="other")
    assert isinstance(one.client.heard[0], ModelNotFound)
    assert one.total(TotalColumn.MODEL_NOT_FOUND) == 1
    assert one.total(TotalColumn.RESPONSES_4XX) == 1


# -- after the first byte ------------------------------------------------------------------------------------


def test_a_failure_after_the_first_byte_is_said_and_not_retried(four: Frontend) -> None:
    four.begin()
    four.http.last.sink.start(200, [])
    four.http.last.sink.write(b"half")
    error = UpstreamBroken("x")
    four.http.last.sink.fail(error)
    assert four.client.heard == [200, b"half", error]
    assert len(four.http.calls) == 1
    assert four.counted(CounterColumn.BROKEN) == 1
    assert four.counted(CounterColumn.STATUS_200) == 1
    assert idle(four)


@pytest.mark.parametrize(
    ("chunk", "tokens"),
    [
        (b"data: 1\n\n", 1),
        (b"data: 1\r\n\r\n", 1),
        (b"data: 1\n\ndata: 2\n\n", 2),
        (b"event: x\ndata: 1\n\n", 1),
        (b": nothing to say\n\n", 0),
        (b"ta: 1\n\n", 0),
        (b'data: "data: 1"\n\n', 1),
        (b"d", 0),
    ],
)
def test_tokens_are_counted_by_events_however_chunks_come(one: Frontend, chunk: bytes, tokens: int) -> None:
    forward = one.begin()  # a chat, whose first event names the role
    sink = one.http.last.sink
    sink.start(200, [])
    sink.write(b"data: role\n\n")
    sink.write(chunk)
    sink.chunk(b"%x\r\n%b\r\n" % (len(chunk), chunk), len(chunk))
    assert forward.tokens_so_far == 2 * tokens
    sink.finish()


# -- time ----------------------------------------------------------------------------------------------------


def test_silence_within_an_answer_ends_it(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, timeouts=Timeouts(idle_secs=10)) as frontend:
        frontend.begin()
        frontend.http.last.sink.start(200, [])
        frontend.time.advance(1000)  # nothing has begun: the first byte may take its time
        frontend.http.last.sink.write(b"a")
        frontend.time.advance(9)
        frontend.http.last.sink.write(b"b")
        frontend.time.advance(9)
        assert frontend.client.heard == [200, b"a", b"b"]
        frontend.time.advance(1)
        assert isinstance(frontend.client.heard[-1], UpstreamTimeout)
        assert frontend.http.last.cancelled
        assert idle(frontend)


def test_the_silence_of_a_slow_client_is_not_the_engines(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, timeouts=Timeouts(idle_secs=10)) as frontend:
        forward = frontend.begin()
        frontend.http.last.sink.start(200, [])
        frontend.http.last.sink.write(b"a")
        for _ in range(4):  # it takes something now and then
            forward.pause()
            assert frontend.http.last.paused
            frontend.time.advance(9)
            forward.resume()
        frontend.time.advance(9)
        assert frontend.client.heard == [200, b"a"]
        frontend.time.advance(1)
        assert isinstance(frontend.client.heard[-1], UpstreamTimeout)


def test_a_client_that_reads_nothing_for_too_long_is_let_go(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, timeouts=Timeouts(idle_secs=10)) as frontend:
        forward = frontend.begin()
        frontend.http.last.sink.start(200, [])
        frontend.http.last.sink.write(b"a")
        frontend.time.advance(5)
        forward.pause()
        frontend.time.advance(9)
        assert frontend.client.heard == [200, b"a"]
        frontend.time.advance(1)
        assert isinstance(frontend.client.heard[-1], ClientTooSlow)
        assert frontend.http.last.cancelled
        assert idle(frontend)


def test_a_stream_may_not_be_silent_after_its_head_either(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, timeouts=Timeouts(idle_secs=10)) as frontend:
        frontend.begin()
        frontend.http.last.sink.start(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
        frontend.time.advance(9)
        assert frontend.client.heard == []
        frontend.time.advance(1)
        assert isinstance(frontend.client.heard[-1], UpstreamTimeout)
        assert idle(frontend)


def test_an_answer_that_comes_at_once_may_take_its_time_after_its_head(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, timeouts=Timeouts(idle_secs=10)) as frontend:
        frontend.begin()
        frontend.http.last.sink.start(200, [(b"content-type", b"application/json")])
        frontend.time.advance(100)
        assert frontend.client.heard == []


def test_an_instance_that_always_dies_in_mid_stream_is_avoided(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, B) as frontend:
        breaker = frontend.forwarder.dispatcher.breaker
        for _ in range(3):
            frontend.begin()
            slot = frontend.http.last.instance.url
            frontend.http.last.sink.start(200, [])
            frontend.http.last.sink.write(b"a")
            frontend.http.last.sink.fail(UpstreamBroken(slot))
        assert sum(breaker.failures(slot) for slot in (0, 1)) == 3


def test_the_first_byte_may_have_a_limit(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, B, timeouts=Timeouts(first_byte_secs=5)) as frontend:
        frontend.begin()
        frontend.http.last.sink.start(200, [])
        frontend.time.advance(5)
        assert isinstance(frontend.client.heard[0], UpstreamTimeout)
        assert len(frontend.http.calls) == 1  # it may be at work on it: a second copy would only add to the load
        assert frontend.http.last.cancelled
        assert idle(frontend)


def test_each_attempt_has_its_own_limit_for_the_first_byte(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, B, timeouts=Timeouts(first_byte_secs=5)) as frontend:
        frontend.begin()
        frontend.time.advance(4)
        frontend.http.last.sink.fail(ConnectFailed("x"))
        frontend.time.advance(4)
        frontend.http.last.answer(b"ok")
        assert frontend.client.heard == [200, b"ok", "end"]
        assert idle(frontend)


# -- the client leaves, the frontend stops ---------------------------------------------------------------------


def nothing(frontend: Frontend) -> None: ...


def headers(frontend: Frontend) -> None:
    frontend.http.last.sink.start(200, [])


def retried(frontend: Frontend) -> None:
    frontend.http.last.sink.fail(ConnectFailed("x"))


def streaming(frontend: Frontend) -> None:
    headers(frontend)
    frontend.http.last.sink.write(b"x")


@pytest.mark.parametrize("before", [nothing, headers, retried, streaming])
def test_a_client_that_leaves_ends_the_call_and_the_lease(four: Frontend, before: Callable[[Frontend], None]) -> None:
    forward = four.begin()
    before(four)
    heard = list(four.client.heard)
    forward.cancel()
    forward.cancel()
    assert four.http.last.cancelled
    assert four.client.heard == heard
    assert four.counted(CounterColumn.GONE) == 1
    assert four.counted(CounterColumn.STATUS_200 if before is streaming else CounterColumn.STATUS_499) == 1
    assert idle(four)


def test_cancel_before_begin_holds_nothing_and_counts_nothing(one: Frontend) -> None:
    forward = one.forward()
    forward.cancel()
    assert idle(one)
    assert one.counted(CounterColumn.STARTED) == 0


def test_cancel_after_the_end_changes_nothing(one: Frontend) -> None:
    forward = one.begin()
    one.http.last.answer(b"ok")
    forward.cancel()
    assert one.counted(CounterColumn.GONE) == 0
    assert one.counted(CounterColumn.FINISHED) == 1


def test_a_client_may_leave_while_it_is_told_the_status(one: Frontend) -> None:
    class Leaving(Client):
        def start(self, status: int, headers: Headers) -> None:
            super().start(status, headers)
            forward.cancel()

    client = Leaving()
    forward: Forward = one.forward(sink=client)
    forward.begin()
    one.http.last.sink.start(200, [])
    one.http.last.sink.write(b"x")
    assert client.heard == [200]
    assert idle(one)


def test_a_frontend_that_stops_says_so_to_every_request(four: Frontend) -> None:
    four.begin()
    waiting = Client()
    four.forward(sink=waiting).begin()
    four.http.calls[0].sink.start(200, [])
    four.http.calls[0].sink.write(b"x")
    error = PenstockError("stopping")
    four.forwarder.end_all(error)
    assert four.client.heard == [200, b"x", error]
    assert waiting.heard == [error]
    assert all(call.cancelled for call in four.http.calls)
    assert idle(four)


def test_a_retry_is_paused_like_the_attempt_before(four: Frontend) -> None:
    forward = four.begin()
    forward.pause()
    four.http.last.sink.fail(ConnectFailed("x"))
    assert four.http.last.paused


# -- the breaker -----------------------------------------------------------------------------------------------


def test_an_instance_that_keeps_failing_is_avoided_until_it_is_tried_again(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, B, upstream=Upstream(breaker_failures=2, breaker_secs=5)) as frontend:
        bad = frontend.slots[A]
        for _ in range(2):
            frontend.breaker.failed(bad, 1, frontend.time.now)
        urls = [frontend.begin(sink=Client()) and frontend.http.last.instance.url for _ in range(6)]
        assert urls == [B] * 6
        frontend.time.advance(6)
        # Idle, so the policy prefers it: the first request is the trial, and until that has ended no second one goes.
        urls = [frontend.begin(sink=Client()) and frontend.http.last.instance.url for _ in range(3)]
        assert urls == [A, B, B]
        next(c for c in frontend.http.calls if c.instance.url == A).answer(b"ok")
        frontend.begin(sink=Client())
        assert frontend.http.last.instance.url == A


def test_if_every_breaker_is_open_the_least_bad_is_tried(tmp_path: Path) -> None:
    with Frontend(tmp_path, A, B, upstream=Upstream(breaker_failures=1)) as frontend:
        for url, failures in ((A, 3), (B, 2)):
            for _ in range(failures):
                frontend.breaker.failed(frontend.slots[url], 1, frontend.time.now)
        frontend.begin()
        assert frontend.http.last.instance.url == B
        frontend.http.last.sink.fail(ConnectFailed("x"))
        assert frontend.http.last.instance.url == A


def test_an_engines_answer_counts_as_health_unless_it_is_a_gateway_status(one: Frontend) -> None:
    for status, failures in ((500, 0), (504, 1), (504, 2), (429, 0)):
        one.begin(sink=Client())
        one.http.last.answer(b"x", status=status)
        assert one.breaker.failures(one.slots[A]) == failures


def test_a_busy_engine_is_not_a_broken_one(one: Frontend) -> None:
    one.begin()
    one.http.last.sink.fail(EngineSaturated("x"))
    assert one.breaker.failures(one.slots[A]) == 0
