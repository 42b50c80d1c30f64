"""The SDK against a scheduler and frontends written from docs/wire.md alone."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from broker import wire
from broker.worker import EngineError, Finish, Request
from tests.broker.worker.serving import Served
from tests.support import raw_native
from tests.support.raw_native import RawFrontend, RawPenstock
from tests.support.waiting import PATIENCE_S, eventually, until


@pytest.fixture
def penstock() -> Iterator[RawPenstock]:
    with RawPenstock() as penstock:
        yield penstock


async def echo(request: Request) -> AsyncIterator[str]:
    for word in request.prompt.split():
        yield word + " "


async def raw_bytes(request: Request) -> AsyncIterator[bytes]:
    yield b"<"
    yield request.raw
    yield b">"


class Gate:
    """A generator that says "begun", waits to be let through, and knows what became of it."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    async def __call__(self, request: Request) -> AsyncIterator[bytes]:
        self.started.append(request.prompt)
        try:
            yield b"begun"
            await eventually(self._open.is_set, "the gate is open", within=60)
            yield b" through"
        finally:
            self.ended.append(request.prompt)


# -- registration ----------------------------------------------------------------------------------------------


def test_the_hello_holds_what_the_author_said(penstock: RawPenstock) -> None:
    transfer = bytes(range(256)) * 24
    with Served(penstock, echo, models=["a", "b"], role="decode", capacity=8, transfer=transfer, name="n") as served:
        tag, protocol, incarnation, endpoint, *rest = served.hello
        assert (tag, protocol) == (32, 1)
        assert len(incarnation) == 16
        assert incarnation[0] != 0
        assert endpoint == f"ipc://@penstock-{incarnation.hex()}"
        assert rest == [2, ["a", "b"], 8, transfer, "n"]


def test_beats_follow_and_goodbye_ends_them(penstock: RawPenstock) -> None:
    with Served(penstock, echo, capacity=3) as served:
        for _ in range(2):
            _, beat = penstock.hear(raw_native.ENGINE_BEAT)
            assert beat == [33, served.incarnation, 3, True]
        served.stop()
        _, goodbye = penstock.hear(raw_native.ENGINE_GOODBYE)
        assert goodbye == [34, served.incarnation]


@pytest.mark.parametrize("answer", [(raw_native.HELLO_AGAIN,), (raw_native.SCHEDULER_BEAT, 2)])
def test_hello_is_said_again_when_the_scheduler_is_another(penstock: RawPenstock, answer: tuple[int, ...]) -> None:
    with Served(penstock, echo) as served:
        peer, _ = penstock.hear(raw_native.ENGINE_BEAT)
        penstock.say(peer, *answer)
        assert penstock.accept(2) == served.hello


def test_hello_is_said_again_when_a_frontend_knows_a_newer_epoch(penstock: RawPenstock) -> None:
    with Served(penstock, echo) as served:
        penstock.hear(raw_native.ENGINE_BEAT)
        with served.frontend(epoch=2):
            assert penstock.accept(2) == served.hello


def test_garbage_from_the_scheduler_is_dropped(penstock: RawPenstock) -> None:
    with Served(penstock, echo):
        peer, _ = penstock.hear(raw_native.ENGINE_BEAT)
        for garbage in (b"", b"\xc1", b"\x93\x30", b"\x91\x7f"):
            penstock.control.send_multipart([peer, garbage])
        penstock.hear(raw_native.ENGINE_BEAT)


def test_an_engine_joins_the_next_run_when_its_own_is_gone() -> None:
    with RawPenstock() as first, Served(first, echo) as served:
        port = first.port
        first.__exit__()
        with RawPenstock(port) as second:
            assert second.run != first.run
            assert second.accept()[2] == served.incarnation


def test_an_engine_may_come_before_its_penstock(caplog: pytest.LogCaptureFixture) -> None:
    with RawPenstock() as gone:
        port = gone.port
    later = RawPenstock.__new__(RawPenstock)
    later.url = f"http://127.0.0.1:{port}"
    served = Served(later, echo)
    with caplog.at_level(logging.WARNING):
        served._thread.start()
        until(lambda: "no answer" in caplog.text, "the engine complains")
    with RawPenstock(port) as penstock:
        assert penstock.accept()[1] == 1
        served.__exit__()


def test_too_much_transfer_metadata_is_refused_at_once(penstock: RawPenstock) -> None:
    from broker.worker import serve

    with pytest.raises(ValueError, match="transfer metadata of 7169 bytes"):
        serve(echo, router=penstock.url, transfer=b"x" * 7169)


# -- answers ---------------------------------------------------------------------------------------------------


def test_text_deltas_become_openai_sse(penstock: RawPenstock) -> None:
    with Served(penstock, echo) as served, served.frontend() as frontend:
        frontend.request(1, {"model": "m", "prompt": "one two"})
        status, body = frontend.answer(1)
        assert status == 200
        *events, end = body.decode().removesuffix("\n\n").split("\n\n")
        assert end == "data: [DONE]"
        chunks = [json.loads(e.removeprefix("data: ")) for e in events]
        assert [c["choices"][0]["text"] for c in chunks] == ["one ", "two ", ""]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert {(c["object"], c["model"]) for c in chunks} == {("text_completion", "m")}


def test_an_unstreamed_answer_is_one_json_document(penstock: RawPenstock) -> None:
    async def generate(_: Request) -> AsyncIterator[str | Finish]:
        yield "a"
        yield "b"
        yield Finish(reason="length", prompt_tokens=3, completion_tokens=2, extra={"kv_transfer_params": None})

    with Served(penstock, generate) as served, served.frontend() as frontend:
        messages = [{"role": "user", "content": "x"}]
        frontend.request(1, {"model": "m", "messages": messages}, path="/v1/chat/completions", stream=False)
        answer = json.loads(frontend.answer(1)[1])
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": "ab"}
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 5
        assert answer["kv_transfer_params"] is None


def test_a_generator_without_a_word_gives_an_answer_without_one(penstock: RawPenstock) -> None:
    with Served(penstock, echo) as served, served.frontend() as frontend:
        frontend.request(1, {"prompt": ""}, stream=False)
        status, body = frontend.answer(1)
        assert (status, json.loads(body)["choices"][0]["text"]) == (200, "")
        frontend.request(2, {"messages": []}, path="/v1/chat/completions")
        status, body = frontend.answer(2)
        assert status == 200
        assert body.endswith(b"data: [DONE]\n\n")


def test_bytes_reach_the_client_as_they_are(penstock: RawPenstock) -> None:
    with Served(penstock, raw_bytes) as served, served.frontend() as frontend:
        body = b'{"n": 12345678901234567890,  "x":\t1e400}'
        frontend.request(1, body)
        assert frontend.answer(1) == (200, b"<" + body + b">")


def test_a_large_answer_arrives_whole_in_pieces(penstock: RawPenstock) -> None:
    large = bytes(range(256)) * 4096 * 5 + b"end"

    async def generate(_: Request) -> AsyncIterator[bytes]:
        yield large

    with Served(penstock, generate) as served, served.frontend() as frontend:
        frontend.request(1, {})
        assert frontend.answer(1) == (200, large)


def test_what_the_request_carried_reaches_the_generator(penstock: RawPenstock) -> None:
    async def generate(request: Request) -> AsyncIterator[bytes]:
        yield f"{request.path} {request.headers['x-request-id']} {request.transfer.hex()}".encode()

    with Served(penstock, generate) as served, served.frontend() as frontend:
        frontend.request(1, {}, path="/v1/x?y=1", headers={"x-request-id": "r7"}, transfer=b"\x00\xff")
        assert frontend.answer(1)[1] == b"/v1/x?y=1 r7 00ff"


def test_deltas_of_one_step_share_a_message(penstock: RawPenstock) -> None:
    begin = asyncio.Event()  # wakes all that wait in the same turn of the loop

    async def generate(_: Request) -> AsyncIterator[bytes]:
        await begin.wait()
        yield b"x"
        await asyncio.sleep(0)
        yield b"y"

    with Served(penstock, generate) as served, served.frontend() as frontend:
        for number in range(8):
            frontend.request(number, {})
        penstock.await_load(8, 0)
        served.call(begin.set)
        assert {delta[0] for delta in frontend.step()} == set(range(8))


def test_low_level_steps_leave_when_the_engine_says_so(penstock: RawPenstock) -> None:
    """An engine with its own batching loop: `emit` per request, `flush_step` per step."""
    from broker.worker import Call, Engine, Load

    class Batch:
        def __init__(self) -> None:
            self.calls: list[Call] = []

        def open(self, call: Call) -> None:
            self.calls.append(call)

        def abort(self, call: Call) -> None:
            self.calls.remove(call)

        def load(self) -> Load:
            return Load(len(self.calls), 0)

    done = threading.Event()

    async def run() -> None:
        batch = Batch()
        engine = Engine(batch, router=penstock.url)
        engine.start()
        await eventually(lambda: len(batch.calls) == 3, "three requests")
        for token in (b"a", b"b"):
            for call in batch.calls:
                engine.emit(call, token)
            engine.flush_step()
        for call in batch.calls:
            engine.finish(call)
        engine.flush_step()
        await eventually(done.is_set, "the test has seen it")
        await engine.stop()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    hello = penstock.accept()
    with RawFrontend(hello[3], hello[2]) as frontend:
        frontend.hello()
        for number in (1, 2, 3):
            frontend.request(number, {})
        steps = [frontend.step() for _ in range(3)]
    done.set()
    thread.join()
    assert [[d[0] for d in step] for step in steps] == [[1, 2, 3]] * 3
    assert [[d[2:4] for d in step] for step in steps] == [[[0, b"a"]] * 3, [[0, b"b"]] * 3, [[1, b""]] * 3]


# -- errors ----------------------------------------------------------------------------------------------------


def test_a_failing_generator_answers_500_and_the_engine_lives_on(
    penstock: RawPenstock, caplog: pytest.LogCaptureFixture
) -> None:
    async def generate(request: Request) -> AsyncIterator[bytes]:
        if request.body:
            raise RuntimeError("a bug")
        yield b"fine"

    with Served(penstock, generate) as served, served.frontend() as frontend:
        frontend.request(1, {"x": 1})
        status, body = frontend.answer(1)
        assert status == 500
        assert json.loads(body)["error"]["type"] == "engine_error"
        frontend.request(2, {})
        assert frontend.answer(2) == (200, b"fine")
    assert "a bug" in caplog.text


def test_an_engine_error_is_answered_as_it_says(penstock: RawPenstock) -> None:
    async def generate(_: Request) -> AsyncIterator[bytes]:
        raise EngineError(413, "too long")
        yield b""

    with Served(penstock, generate) as served, served.frontend() as frontend:
        frontend.request(1, {})
        status, body = frontend.answer(1)
        assert (status, json.loads(body)["error"]["message"]) == (413, "too long")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_body_that_is_no_object_is_a_400_for_who_reads_it(penstock: RawPenstock, body: bytes) -> None:
    with Served(penstock, echo) as served, served.frontend() as frontend:
        frontend.request(1, body)
        assert frontend.answer(1)[0] == 400


def test_a_request_for_another_incarnation_is_not_run(penstock: RawPenstock) -> None:
    gate = Gate()
    with Served(penstock, gate) as served, served.frontend() as frontend:
        frontend.request(1, {"prompt": "p"}, incarnation=bytes(16))
        assert frontend.answer(1)[0] == 409
        assert gate.started == []


def test_a_request_before_hello_is_not_run(penstock: RawPenstock) -> None:
    with Served(penstock, echo) as served, RawFrontend(served.endpoint, served.incarnation) as frontend:
        frontend.request(1, {"prompt": "p"})
        assert frontend.answer(1)[0] == 409


def test_a_frontend_of_another_protocol_is_told_ours_and_not_served(penstock: RawPenstock) -> None:
    with Served(penstock, echo) as served, RawFrontend(served.endpoint, served.incarnation) as frontend:
        frontend.say(raw_native.DATA_HELLO, 99, 1)
        assert frontend.hear(raw_native.DATA_WELCOME) == [80, 1, served.incarnation]
        frontend.request(1, {"prompt": "p"})
        assert frontend.answer(1)[0] == 409


def test_garbage_is_dropped_and_logged_once_per_peer(penstock: RawPenstock, caplog: pytest.LogCaptureFixture) -> None:
    with Served(penstock, raw_bytes) as served, served.frontend() as frontend, served.frontend() as other:
        for garbage in (b"", b"\xc1", b"\x91", b"\x91\x7f", b"\x92\x40\x01", b"x" * 100_000, b"\xdc\xff\xff"):
            frontend.socket.send(garbage)
        frontend.socket.send_multipart([b"\x91\x41", b"a", b"b"])
        frontend.socket.send_multipart([b"\x91\x41", b"a"])
        frontend.socket.send(wire.encode(wire.Request(served.incarnation, 9, "/", True, {})))  # no body
        for peer in (frontend, other):
            peer.request(1, b"{}")
            assert peer.answer(1) == (200, b"<{}>")
    assert caplog.text.count("dropped a frame of peer") == 1


# -- capacity and order ----------------------------------------------------------------------------------------


def test_capacity_runs_the_others_wait_in_order_and_beyond_the_bound_is_429(penstock: RawPenstock) -> None:
    gate = Gate()
    with Served(penstock, gate, capacity=2, max_waiting=3) as served, served.frontend() as frontend:
        for number in range(6):
            frontend.request(number, {"prompt": str(number)})
        assert frontend.answer(5)[0] == 429
        penstock.await_load(2, 3)
        assert gate.started == ["0", "1"]
        gate.open()
        answers = frontend.answers(2, 3, 4)
        assert set(answers.values()) == {(200, b"begun through")}
        assert gate.started == ["0", "1", "2", "3", "4"]
        penstock.await_load(0, 0)


def test_load_is_published_with_rising_sequence_and_at_least_every_second(penstock: RawPenstock) -> None:
    with Served(penstock, echo) as served:
        loads = penstock.loads()
        first, load = next(loads)
        assert load == ["Load", served.incarnation, 0, 0, -1, -1]
        second, _ = next(loads)  # idle all the time: this one is the heartbeat
        assert second == first + 1


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


def test_a_frontend_that_went_away_loses_its_requests_at_the_next_delta(penstock: RawPenstock) -> None:
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
        assert ended.wait(2.0), "sooner than silence would tell"


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
        assert ended.wait(30)
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


# -- as a program ----------------------------------------------------------------------------------------------

PROGRAM = """
import sys
from broker.worker import serve

async def generate(request):
    for word in request.prompt.split():
        yield word + " "

serve(generate, router=sys.argv[1], models=["echo"], capacity=8)
"""


def test_ten_lines_are_an_engine_and_sigterm_ends_it(penstock: RawPenstock) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, penstock.url]) as process:
        hello = penstock.accept()
        with RawFrontend(hello[3], hello[2]) as frontend:
            frontend.hello()
            frontend.request(1, {"prompt": "one two"}, stream=False)
            assert json.loads(frontend.answer(1)[1])["choices"][0]["text"] == "one two "
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


def test_the_sdk_needs_nothing_but_pyzmq_and_msgspec() -> None:
    code = "import sys, broker.worker; print(*sorted({m.partition('.')[0] for m in sys.modules} & set(sys.argv[1:])))"
    others = [
        "numpy",
        "starlette",
        "uvicorn",
        "uvloop",
        "aiohttp",
        "orjson",
        "msgpack",
        "yaml",
        "click",
        "frontend",
        "shm",
    ]
    out = subprocess.run([sys.executable, "-c", code, *others], capture_output=True, text=True, check=True).stdout
    assert out.split() == []


# -- anything may come -----------------------------------------------------------------------------------------


def spoiled(frame: bytes, rng: random.Random) -> bytes:
    """A valid message with a few bytes changed, cut or doubled."""
    data = bytearray(frame)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(data)


def test_no_frame_ends_or_stalls_the_engine(penstock: RawPenstock) -> None:
    rng = random.Random(5)
    with Served(penstock, raw_bytes) as served, served.frontend() as frontend, served.frontend() as other:
        valid = [
            wire.encode(wire.DataHello(1, 1)),
            wire.encode(wire.Ping()),
            wire.encode(wire.Request(served.incarnation, 1, "/v1/completions", True, {"a": "b"}, b"t")),
            wire.encode(wire.Abort([1, 2, 3])),
        ]
        for _ in range(3000):
            head = spoiled(rng.choice(valid), rng) if rng.random() < 0.8 else rng.randbytes(rng.randrange(40))
            frontend.socket.send_multipart([head, *([b"{}"] * rng.randrange(3))])
        other.request(1, b"{}")
        assert other.answer(1) == (200, b"<{}>")


def test_a_runner_that_fails_to_open_answers_500_and_the_next_message_is_read(
    penstock: RawPenstock, caplog: pytest.LogCaptureFixture
) -> None:
    def generate(request: Request) -> AsyncIterator[bytes]:  # not a generator: fails when it is called
        if request.stream:
            raise RuntimeError("a bug before the first yield")
        return raw_bytes(request)

    with Served(penstock, generate) as served, served.frontend() as frontend:
        frontend.request(1, b"{}", stream=True)
        frontend.request(2, b"{}", stream=False)
        answers = frontend.answers(1, 2)
    assert (answers[1][0], answers[2]) == (500, (200, b"<{}>"))
    assert "a bug before the first yield" in caplog.text
