"""The simulated engine over HTTP, as a real process: its answers to the byte, its faults, its end."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from broker.worker.sim.engine import EXIT_DIED, answer_id
from broker.worker.sim.text import prompt_of
from tests.broker.worker.simulated import Simulated, expected, pipe
from tests.support.waiting import PATIENCE_S, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 6}
TEXT = {"model": "m", "prompt": "Hello there", "max_tokens": 6}


@pytest.fixture(scope="module")
def shared() -> Iterator[Simulated]:
    """For tests that leave no trace."""
    with Simulated("--model", "m") as engine:
        yield engine


@pytest.fixture
def engine() -> Iterator[Simulated]:
    with Simulated("--model", "m") as engine:
        yield engine


def deltas(body: bytes) -> list[dict[str, Any]]:
    *events, end = body.decode().removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(e.removeprefix("data: ")) for e in events]


class Open:
    """A request on the wire whose answer is read by hand."""

    def __init__(self, engine: Simulated, body: object, path: str = "/v1/completions") -> None:
        raw = json.dumps(body).encode()
        self.socket = socket.create_connection(("127.0.0.1", engine.port), timeout=PATIENCE_S)
        self.socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw
        )
        self.read = b""

    def until(self, part: bytes) -> None:
        while part not in self.read:
            data = self.socket.recv(65536)
            assert data, f"closed before {part!r}: {self.read!r}"
            self.read += data

    def rest(self) -> bytes:
        try:
            while data := self.socket.recv(65536):
                self.read += data
        except ConnectionResetError:
            pass
        self.socket.close()
        return self.read


# -- answers ---------------------------------------------------------------------------------------------------


def test_an_unstreamed_answer_is_computed_from_prompt_and_name_alone(shared: Simulated) -> None:
    answer = shared.json("/v1/chat/completions", CHAT)
    assert answer == {
        "id": f"chatcmpl-{answer_id(prompt_of('chat', CHAT).digest, 'a')}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "system_fingerprint": "a",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": expected("chat", CHAT, "a")},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": answer["usage"],
    }
    assert answer["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_a_stream_carries_the_same_text_one_token_per_event(shared: Simulated, path: str, body: dict[str, Any]) -> None:
    status, raw = shared.call(path, {**body, "stream": True})
    assert status == 200
    choices = [d["choices"][0] for d in deltas(raw)]
    if path.endswith("chat/completions"):
        assert choices.pop(0)["delta"] == {"role": "assistant", "content": ""}
        pieces = [c["delta"].get("content", "") for c in choices]
        text = expected("chat", body, "a")
    else:
        pieces = [c["text"] for c in choices]
        text = expected("completion", body, "a")
    assert len(pieces) == 7, "six tokens and the end"
    assert "".join(pieces) == text
    assert [c["finish_reason"] for c in choices] == [None] * 6 + ["length"]


def test_a_repeated_request_gives_the_same_bytes(shared: Simulated) -> None:
    bodies = {shared.call("/v1/completions", {**TEXT, "stream": True})[1] for _ in range(3)}
    assert len(bodies) == 1


def test_another_prompt_path_or_name_gives_another_text(shared: Simulated) -> None:
    texts = {
        expected("completion", TEXT, "a"),
        expected("completion", TEXT, "b"),
        expected("completion", TEXT, "a", b"transfer"),
        expected("completion", {**TEXT, "prompt": "Hello thera"}, "a"),
        expected("chat", CHAT, "a"),
        expected("chat", {**CHAT, "tools": [{"type": "function"}]}, "a"),
    }
    assert len(texts) == 6


def test_usage_comes_last_in_a_stream_when_asked_for(shared: Simulated) -> None:
    _, raw = shared.call("/v1/completions", {**TEXT, "stream": True, "stream_options": {"include_usage": True}})
    last = deltas(raw)[-1]
    assert last["choices"] == []
    assert (last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == (3, 6)


def test_without_max_tokens_it_stops_by_itself_and_ignore_eos_goes_on(shared: Simulated) -> None:
    free = {k: v for k, v in TEXT.items() if k != "max_tokens"}
    answer = shared.json("/v1/completions", free)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert 8 <= answer["usage"]["completion_tokens"] <= 64
    answer = shared.json("/v1/completions", {**TEXT, "max_tokens": 100, "ignore_eos": True})
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (100, "length")


def test_a_repeated_prompt_reports_cached_tokens(shared: Simulated) -> None:
    body = {"prompt": "a prompt of some length " * 20, "max_tokens": 1}
    cached = [shared.json("/v1/completions", body)["usage"]["prompt_tokens_details"]["cached_tokens"] for _ in range(2)]
    assert cached == [0, 112]  # 480 characters, 120 tokens, 16 to a block, the last token always computed


def test_token_ids_are_a_prompt(shared: Simulated) -> None:
    assert shared.json("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 1})["usage"]["prompt_tokens"] == 3


def test_embeddings_and_models(shared: Simulated) -> None:
    for given, vectors in (("x", 1), (["x"], 1), (["x", "y"], 2), ([1, 2], 1)):
        answer = shared.json("/v1/embeddings", {"model": "m", "input": given})
        assert [len(d["embedding"]) for d in answer["data"]] == [8] * vectors
    assert [m["id"] for m in shared.json("/v1/models")["data"]] == ["m"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        ({"prompt": 5}, 400),
        ({"prompt": ["a", "b"]}, 400),
        ({"prompt": "x", "max_tokens": 0}, 400),
        ({"prompt": "x", "max_tokens": "5"}, 400),
        ({"prompt": "x", "n": 2}, 400),
        ({"prompt": "x", "model": "other"}, 404),
        ({"prompt": "x" * 4_000_000}, 400),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_an_openai_error(shared: Simulated, body: object, status: int) -> None:
    got, raw = shared.call("/v1/completions", body)
    assert got == status
    assert json.loads(raw)["error"]["code"] == status


# -- the ledger and the metrics --------------------------------------------------------------------------------


def test_the_ledger_counts_tokens_and_bytes_by_request_id(engine: Simulated) -> None:
    _, raw = engine.call("/v1/completions", {**TEXT, "stream": True}, {"X-Request-Id": "r1"})
    assert engine.ledger() == [
        {"id": "r1", "path": "/v1/completions", "state": "finished", "tokens": 6, "bytes": len(raw)}
    ]


def test_a_client_that_leaves_ends_its_request_at_once(engine: Simulated) -> None:
    engine.fault(slow=50)
    streaming = Open(engine, {**TEXT, "max_tokens": 10_000, "ignore_eos": True, "stream": True})
    streaming.until(b"data: ")
    unstreamed = Open(engine, {**TEXT, "max_tokens": 10_000, "ignore_eos": True})
    until(lambda: len(engine.ledger()) == 2, "both run")
    streaming.socket.close()
    unstreamed.socket.close()
    until(lambda: {e["state"] for e in engine.ledger()} == {"aborted"}, "both are aborted")
    assert engine.json("/ledger")["idle"]


@pytest.mark.parametrize(
    ("dialect", "running"),
    [
        ("vllm", 'vllm:num_requests_running{engine="0",model_name="m"}'),
        ("sglang", 'sglang:num_running_reqs{model_name="m",engine_type="unified",tp_rank="0",pp_rank="0"}'),
        ("fastdeploy", "fastdeploy:num_requests_running"),
    ],
)
def test_metrics_have_the_dialects_names(dialect: str, running: str) -> None:
    with Simulated("--model", "m", "--dialect", dialect, "--slow", "100") as engine:
        held = Open(engine, {**TEXT, "max_tokens": 1000, "ignore_eos": True, "stream": True})
        until(lambda: f"{running} 1.0" in engine.call("/metrics")[1].decode(), "one is running")
        held.socket.close()


# -- faults ----------------------------------------------------------------------------------------------------


def test_hang_after_holds_the_answer_and_its_place(engine: Simulated) -> None:
    engine.fault(hang_after=2)
    held = Open(engine, {**TEXT, "stream": True})
    until(lambda: "num_requests_running" in engine.call("/metrics")[1].decode(), "it runs")
    until(lambda: [e["tokens"] for e in engine.ledger()] == [2], "two tokens came")
    metrics = engine.call("/metrics")[1].decode()
    assert 'vllm:num_requests_running{engine="0",model_name="m"} 1.0' in metrics
    held.socket.close()
    until(lambda: engine.ledger()[0]["state"] == "aborted", "it can be aborted")
    assert 'running{engine="0",model_name="m"} 0.0' in engine.call("/metrics")[1].decode()


def test_die_after_sends_that_many_tokens_and_dies(engine: Simulated) -> None:
    engine.fault(die_after=2)
    answer = Open(engine, {**TEXT, "stream": True}).rest()
    assert answer.count(b'"finish_reason":null') == 2
    assert b"[DONE]" not in answer
    assert engine.process.wait(PATIENCE_S) == EXIT_DIED


def test_a_share_of_requests_is_rejected_and_the_seed_says_which() -> None:
    statuses = []
    for _ in range(2):
        with Simulated("--reject-share", "0.5", "--reject-status", "429", "--seed", "3") as engine:
            statuses.append([engine.call("/v1/completions", TEXT)[0] for _ in range(20)])
    assert statuses[0] == statuses[1]
    assert set(statuses[0]) == {200, 429}


def test_silent_metrics_do_not_answer_until_they_are_switched_on(engine: Simulated) -> None:
    engine.fault(silent_metrics=True)
    connection = http.client.HTTPConnection("127.0.0.1", engine.port, timeout=0.3)
    connection.request("GET", "/metrics")
    with pytest.raises(TimeoutError):
        connection.getresponse()
    connection.close()
    engine.fault(silent_metrics=False)
    assert engine.call("/metrics")[0] == 200


def test_unhealthy_is_a_503(engine: Simulated) -> None:
    assert engine.call("/health")[0] == 200
    engine.fault(unhealthy=True)
    assert engine.call("/health")[0] == 503


def test_a_malformed_head_is_no_http(engine: Simulated) -> None:
    engine.fault(malformed="head")
    answer = Open(engine, TEXT).rest()
    assert answer.startswith(b"this is\r\nno head of HTTP")


@pytest.mark.parametrize("stream", [False, True])
def test_a_truncated_answer_ends_before_its_end(engine: Simulated, stream: bool) -> None:
    engine.fault(malformed="truncated")
    with pytest.raises(http.client.IncompleteRead):
        engine.call("/v1/completions", {**TEXT, "stream": stream})


def test_an_unknown_fault_is_a_400_that_names_it(shared: Simulated) -> None:
    status, raw = shared.call("/fault", {"nope": 1})
    assert status == 400
    assert b"nope" in raw


# -- registration and the end ----------------------------------------------------------------------------------


class Registrar:
    """A router of which only `POST /register` exists; refuses the first one."""

    def __init__(self) -> None:
        bodies: list[dict[str, Any]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/register"
                bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(503 if len(bodies) == 1 else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.bodies = bodies
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.mark.parametrize("dialect", ["fastdeploy", "vllm"])
def test_it_registers_as_a_fastdeploy_engine_does_and_again_after_a_refusal(dialect: str) -> None:
    router = Registrar()
    try:
        with Simulated("--router", router.url, "--dialect", dialect, "--model", "m", "--capacity", "7") as engine:
            until(lambda: len(router.bodies) >= 2, "it tries again")
            body = router.bodies[1]
            assert (body["host_ip"], body["port"], body["role"]) == ("127.0.0.1", engine.port, "mixed")
            extra = {k: body[k] for k in ("engine", "models", "capacity") if k in body}
            assert extra == ({} if dialect == "fastdeploy" else {"engine": "vllm", "models": ["m"], "capacity": 7})
    finally:
        router.close()


def test_sigterm_lets_a_short_answer_finish(engine: Simulated) -> None:
    engine.fault(slow=20)
    answer = Open(engine, {**TEXT, "stream": True})
    answer.until(b"data: ")
    engine.process.send_signal(signal.SIGTERM)
    assert b"data: [DONE]" in answer.rest()
    assert engine.process.wait(PATIENCE_S) == 0


def test_sigterm_does_not_wait_for_a_long_answer(engine: Simulated) -> None:
    engine.fault(hang_after=1)
    answer = Open(engine, {**TEXT, "stream": True})
    answer.until(b"data: ")
    engine.process.send_signal(signal.SIGTERM)
    assert engine.process.wait(PATIENCE_S) == 0
    answer.rest()


def test_with_a_parent_it_ignores_sigint_and_ends_with_the_parent() -> None:
    read, write = pipe()
    with Simulated("--alive-fd", str(read), pass_fds=(read,)) as engine:
        os.close(read)
        engine.process.send_signal(signal.SIGINT)
        assert engine.call("/health")[0] == 200
        os.close(write)
        assert engine.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    "options",
    [["--speed", "0"], ["--transport", "zmq"], ["--reject-share", "2"], ["--transfer", "xy"], ["--dialect", "x"]],
    ids=" ".join,
)
def test_options_that_cannot_be_used_end_it_with_2(options: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    from broker.worker.sim.__main__ import main

    with pytest.raises(SystemExit) as end:
        main(options)
    assert end.value.code == 2
    assert "error:" in capfd.readouterr().err


@pytest.mark.parametrize("number", ["12345678901234567890", "123456789012345678901234567890", "1e3"])
def test_numbers_of_any_size_may_be_part_of_a_prompt(shared: Simulated, number: str) -> None:
    raw = b'{"messages": [{"role": "user", "content": [{"n": %s}]}], "max_tokens": 2}' % number.encode()
    assert shared.call("/v1/chat/completions", raw)[0] == 200
