"""The simulated engine over ZMQ, as a real process, spoken to from docs/wire.md alone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import msgpack
import pytest

from broker.worker.sim.engine import EXIT_DIED
from tests.broker.worker.simulated import Simulated, expected
from tests.support import raw_native
from tests.support.raw_native import RawFrontend, RawPenstock
from tests.support.waiting import PATIENCE_S, until

BODY = {"model": "m", "prompt": "Hello there", "max_tokens": 6}
LONG = {**BODY, "max_tokens": 10_000, "ignore_eos": True}


class Fleet:
    """One engine, its Penstock and one frontend."""

    def __init__(self, stack: ExitStack, *options: str) -> None:
        self.penstock = stack.enter_context(RawPenstock())
        options = ("--transport", "zmq", "--router", self.penstock.url, "--admin-port", "0", "--model", "m", *options)
        self.engine = stack.enter_context(Simulated(*options))
        self.hello = self.penstock.accept()
        self.frontend = stack.enter_context(RawFrontend(self.hello[3], self.hello[2]))
        self.frontend.hello()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_it_registers_what_its_options_say(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--role", "prefill", "--capacity", "7", "--transfer", "00ff")
    assert fleet.hello[3:] == [fleet.engine.url, 1, ["m"], 7, b"\x00\xff", "a"]
    assert fleet.engine.url == f"ipc://@penstock-{fleet.hello[2].hex()}"


def test_it_may_listen_on_tcp(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--bind", "tcp://127.0.0.1:*")
    assert fleet.engine.url.startswith("tcp://127.0.0.1:")
    fleet.frontend.request(1, BODY, stream=False)
    assert fleet.frontend.answer(1)[0] == 200


def test_its_answers_are_those_of_the_http_shell_to_the_byte(stack: ExitStack) -> None:
    fleet = Fleet(stack)
    http = stack.enter_context(Simulated("--model", "m"))
    for number, stream in enumerate((False, True)):
        body = {**BODY, "stream": stream}
        fleet.frontend.request(number, body, stream=stream)
        assert fleet.frontend.answer(number) == http.call("/v1/completions", body)


def test_one_message_per_step_carries_every_request(stack: ExitStack) -> None:
    fleet = Fleet(stack)
    fleet.engine.process.send_signal(signal.SIGSTOP)  # all of them are there when it goes on, however long that takes
    for number in range(16):
        fleet.frontend.request(number, {**BODY, "prompt": f"prompt {number}", "max_tokens": 30, "ignore_eos": True})
    fleet.engine.process.send_signal(signal.SIGCONT)
    sizes = []
    ended = 0
    while ended < 16:
        step = fleet.frontend.step()
        ended += sum(kind == raw_native.DONE for _, _, kind, _ in step)
        sizes.append(len(step))
        assert len({delta[0] for delta in step}) == len(step), "one delta of a request per step"
    assert max(sizes) == 16
    assert len(sizes) < 60


def test_the_ledger_agrees_with_what_was_received(stack: ExitStack) -> None:
    fleet = Fleet(stack)
    received = {}
    for number in range(5):
        fleet.frontend.request(number, BODY, headers={"x-request-id": f"r{number}"})
    for number, (_, data) in fleet.frontend.answers(*range(5)).items():
        received[f"r{number}"] = len(data)
    assert {e["id"]: e["bytes"] for e in fleet.engine.ledger()} == received
    assert {e["state"] for e in fleet.engine.ledger()} == {"finished"}


def test_abort_frees_the_engine_at_once(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--slow", "10")
    for number in range(3):
        fleet.frontend.request(number, LONG)
    fleet.penstock.await_load(3, 0)
    fleet.frontend.abort(0, 1, 2)
    fleet.penstock.await_load(0, 0)
    assert {e["state"] for e in fleet.engine.ledger()} == {"aborted"}


def test_load_tells_what_runs_waits_and_fills_the_cache(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--capacity", "2", "--kv-blocks", "100", "--slow", "100")
    for number in range(3):
        fleet.frontend.request(number, {"prompt": "x" * 64 * 4 * 5, "max_tokens": 160, "ignore_eos": True})
    load = fleet.penstock.await_load(2, 1)
    assert load[4] == 320, "the prompt of the one that waits"
    assert 300 <= load[5] <= 600, "two of 30 blocks out of 100, of which 20 may be shared"


def test_a_bad_request_is_answered_and_not_run(stack: ExitStack) -> None:
    fleet = Fleet(stack)
    fleet.frontend.request(1, {**BODY, "model": "other"})
    assert fleet.frontend.answer(1)[0] == 404
    fleet.frontend.request(2, BODY, path="/v1/nothing")
    assert fleet.frontend.answer(2)[0] == 404
    assert fleet.engine.ledger() == []


# -- faults ----------------------------------------------------------------------------------------------------


def test_a_gap_leaves_a_sequence_out(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--malformed", "gap")
    fleet.frontend.request(1, BODY)
    sequences: list[int] = []
    while len(sequences) < 6:
        sequences += [delta[1] for delta in fleet.frontend.step()]
    assert sequences == [0, 2, 3, 4, 5, 6]


def test_a_bad_frame_comes_before_the_answer(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--malformed", "frame")
    fleet.frontend.request(1, BODY)
    garbage = next(iter(raw_native.frames_of(fleet.frontend.socket, 10)))
    with pytest.raises(msgpack.exceptions.UnpackException):
        msgpack.unpackb(garbage[0])


def test_silent_metrics_publish_no_load(stack: ExitStack) -> None:
    fleet = Fleet(stack)
    next(fleet.penstock.loads())
    fleet.engine.fault(silent_metrics=True)
    # Reports that were on their way may still come; later a heartbeat would come every second.
    until(lambda: not list(fleet.penstock.loads(within=1.5)), "silence")
    fleet.engine.fault(silent_metrics=False)
    next(fleet.penstock.loads())


def test_die_after_kills_it_in_mid_stream(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--die-after", "3")
    fleet.frontend.request(1, BODY)
    assert fleet.engine.process.wait(PATIENCE_S) == EXIT_DIED
    received = [delta for delta in fleet.frontend.received() if delta[2] == raw_native.CHUNK]
    assert [delta[1] for delta in received] == [0, 1, 2]


def test_sigterm_says_goodbye_and_finishes(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--slow", "200")  # 0.12 s a token
    fleet.frontend.request(1, BODY)
    until(fleet.engine.ledger, "it runs")
    fleet.engine.process.send_signal(signal.SIGTERM)
    fleet.penstock.hear(raw_native.ENGINE_GOODBYE)
    assert fleet.frontend.answer(1)[0] == 200
    assert fleet.engine.process.wait(PATIENCE_S) == 0


# -- prefill and decode ----------------------------------------------------------------------------------------


def test_decode_needs_its_peers_metadata_and_speaks_differently_with_it(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--role", "decode")
    fleet.frontend.request(1, BODY, stream=False)
    assert fleet.frontend.answer(1)[0] == 400
    fleet.frontend.request(2, BODY, stream=False, transfer=b"\x00peer")
    status, raw = fleet.frontend.answer(2)
    assert status == 200
    assert json.loads(raw)["choices"][0]["text"] == expected("completion", BODY, "a", b"\x00peer")


def test_prefill_answers_one_token(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--role", "prefill")
    fleet.frontend.request(1, BODY, stream=False)
    assert json.loads(fleet.frontend.answer(1)[1])["usage"]["completion_tokens"] == 1


def test_a_request_held_by_a_hang_is_told_when_the_engine_ends(stack: ExitStack) -> None:
    fleet = Fleet(stack, "--hang-after", "1")
    fleet.frontend.request(1, BODY)
    fleet.frontend.step()
    fleet.engine.process.send_signal(signal.SIGTERM)

    def error() -> list[object] | None:
        fleet.frontend.say(raw_native.PING)
        return next((delta for delta in fleet.frontend.step() if delta[2] == raw_native.ERROR), None)

    delta = until(error, "the hung request ends")
    assert delta[4] == 503
    assert fleet.engine.process.wait(PATIENCE_S) == 0
