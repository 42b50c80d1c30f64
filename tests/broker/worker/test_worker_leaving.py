"""Clients leave, frontends die, an engine stops: what the SDK ends, and whom it tells."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from broker import wire
from broker.worker import Request
from tests.broker.worker.serving import Gate, Served, echo
from tests.support import raw_native
from tests.support.raw_native import RawFrontend, RawPenstock
from tests.support.waiting import PATIENCE_S, until

# -- the client leaves, the frontend dies ----------------------------------------------------------------------


def test_abort_ends_the_generator_and_nothing_more_is_said(penstock: RawPenstock) -> None:
    gate = Gate()
    with Served(penstock, gate) as served, served.frontend() as frontend:
        frontend.request(1, {"prompt": "p"})
        assert frontend.step() == [[1, 0, 0, b"begun"]]
        frontend.abort(1, 77)
        until(lambda: gate.ended == ["p"], "its finally has run")
        gate.open()
        penstock.await_load(0, 0)
        assert frontend.is_quiet(0.2)


def test_a_waiting_request_is_aborted_without_having_run(penstock: RawPenstock) -> None:
    gate = Gate()
    with Served(penstock, gate, capacity=1) as served, served.frontend() as frontend:
        frontend.request(1, {"prompt": "runs"})
        frontend.request(2, {"prompt": "waits"})
        penstock.await_load(1, 1)
        frontend.abort(2)
        penstock.await_load(1, 0)
        gate.open()
        assert frontend.answer(1) == (200, b"begun through")
        assert gate.started == ["runs"]


def test_a_silent_frontend_loses_its_requests_and_is_told(penstock: RawPenstock) -> None:
    gate = Gate()
    with Served(penstock, gate) as served, served.frontend() as silent, served.frontend() as lively:
        silent.request(1, {"prompt": "silent"})
        lively.request(1, {"prompt": "lively"})
        penstock.await_load(2, 0)

        def ended() -> bool:
            lively.say(raw_native.PING)
            return bool(gate.ended)

        until(ended, "the silent frontend's request is aborted")
        assert gate.ended == ["silent"]
        silent_end = silent.step()[-1] if (first := silent.step()) == [[1, 0, 0, b"begun"]] else first[-1]
        assert silent_end[:3] == [1, 1, 2]
        assert silent_end[4] == 503
        silent.request(2, {"prompt": "back again"})
        gate.open()
        assert silent.answer(2) == (200, b"begun through")
        assert lively.answer(1) == (200, b"begun through")


def test_pings_are_answered_with_the_incarnation(penstock: RawPenstock) -> None:
    with Served(penstock, echo) as served, RawFrontend(served.endpoint, served.incarnation) as frontend:
        frontend.say(raw_native.PING)
        assert frontend.hear(raw_native.PONG) == [81, served.incarnation]


def test_a_frontend_that_went_away_loses_its_requests_at_the_next_delta(
    penstock: RawPenstock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "DEAD_AFTER_S", 3600.0)  # silence tells nothing
    ended = threading.Event()

    async def generate(_: Request) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.01)
        finally:
            ended.set()

    with Served(penstock, generate) as served:
        with served.frontend() as frontend:
            frontend.request(1, {})
            frontend.step()
        assert ended.wait(PATIENCE_S)


def test_a_frontend_that_does_not_read_is_bounded_and_its_requests_end(
    penstock: RawPenstock, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()

    async def flood(_: Request) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 65536
                await asyncio.sleep(0)
        finally:
            ended.set()

    with Served(penstock, flood) as served, RawFrontend(served.endpoint, served.incarnation) as frontend:
        frontend.socket.setsockopt(raw_native.zmq.RCVHWM, 10)
        frontend.hello()
        frontend.request(1, {})
        assert ended.wait(PATIENCE_S)
        assert "does not read" in caplog.text
        frontend.request(2, {})
        answers = frontend.answers(1, 2)  # no gap before the error
        assert [answers[number][0] for number in (1, 2)] == [503, 503]


# -- the end ---------------------------------------------------------------------------------------------------


def test_on_stop_running_requests_finish_and_new_ones_are_refused(penstock: RawPenstock) -> None:
    gate = Gate()
    with Served(penstock, gate) as served, served.frontend() as frontend:
        frontend.request(1, {"prompt": "p"})
        penstock.await_load(1, 0)
        served.stop()
        penstock.hear(raw_native.ENGINE_GOODBYE)
        frontend.request(2, {"prompt": "late"})
        assert frontend.answer(2)[0] == 503
        gate.open()
        rest = [delta for delta in frontend.step() if delta[0] == 1]
        assert rest[-1][2:4] in ([0, b" through"], [1, b""])


def test_what_does_not_finish_in_time_ends_with_an_error(penstock: RawPenstock) -> None:
    with Served(penstock, Gate(), drain_s=0.1) as served, served.frontend() as frontend:
        frontend.request(1, {"prompt": "p"})
        penstock.await_load(1, 0)
        served.stop()
        assert frontend.answer(1)[0] == 503
