"""The SDK against a scheduler and frontends written from docs/wire.md alone."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import pytest

from broker import wire
from broker.worker import EngineError, Finish, Request
from tests.broker.worker.serving import Gate, Served, echo, raw_bytes
from tests.support import raw_native
from tests.support.raw_native import RawFrontend, RawPenstock
from tests.support.waiting import PATIENCE_S, eventually

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
