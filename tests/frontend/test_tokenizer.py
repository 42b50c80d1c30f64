"""FastDeploy's tokenizer service: what it is asked, what becomes of its answer, and how long it is waited for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from broker.config import build
from broker.errors import ConnectFailed
from broker.route import RouteRequest
from frontend.forward import Forward
from frontend.tokenizer import REMEMBERED, Tokenizer
from frontend.upstream.base import UpstreamRequest
from tests.frontend.fakes import Frontend


def tokenizer(frontend: Frontend, url: str = "tok:80") -> Tokenizer:
    return Tokenizer(url, 2.0, frontend.http, frontend.forwarder.loop)


@pytest.fixture
def frontend(tmp_path: Path) -> Iterator[Frontend]:
    with Frontend(tmp_path, "http://a:1") as frontend:
        yield frontend


def begun(frontend: Frontend) -> Forward:
    """A request whose prompt is "Hello"."""
    request = UpstreamRequest(path="/v1/completions", headers=[], body=b"{}")
    forward = frontend.forwarder.forward(b"id", RouteRequest(model="tiny", prompt="Hello"), request, frontend.client)
    forward.begin()
    return forward


class Heard(list[list[int]]):
    def __call__(self, ids: Sequence[int]) -> None:
        self.append(list(ids))


@pytest.mark.parametrize(
    ("url", "service", "path"),
    [
        ("tok:80", "http://tok:80", "/tokenize"),
        ("http://tok:80/", "http://tok:80", "/tokenize"),
        ("http://tok/cut?model=m", "http://tok", "/cut?model=m"),
    ],
)
def test_a_url_may_leave_out_scheme_and_path(frontend: Frontend, url: str, service: str, path: str) -> None:
    tokenizer(frontend, url).ask("Hello", Heard())
    (call,) = frontend.http.calls
    assert (call.instance.url, call.request.path) == (service, path)
    assert json.loads(call.request.body) == {"text": "Hello", "prompt": "Hello", "message": "Hello"}


def test_an_answer_is_heard_once_and_remembered(frontend: Frontend) -> None:
    service, heard = tokenizer(frontend), Heard()
    service.ask("Hello", heard)
    (call,) = frontend.http.calls
    call.sink.start(200, [])
    call.sink.write(b'{"input_ids": [1,')
    call.sink.write(b" 2, 3]}")
    call.sink.finish()
    assert heard == [[1, 2, 3]]
    assert list(service.known("Hello") or ()) == [1, 2, 3]
    assert service.known("Hello!") is None


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (500, b'{"input_ids": [1]}'),
        (302, b'{"input_ids": [1]}'),
        (200, b'{"input_ids": []}'),
        (200, b'{"ids": [1]}'),
        (200, b'{"input_ids": ["a"]}'),
        (200, b'{"input_ids": [99999999999999999999]}'),
        (200, b"no JSON"),
    ],
)
def test_any_other_answer_leaves_characters_and_is_told(
    frontend: Frontend, status: int, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    service, heard = tokenizer(frontend), Heard()
    service.ask("Hello", heard)
    (call,) = frontend.http.calls
    call.sink.start(status, [])
    call.sink.write(answer)
    call.sink.finish()
    assert heard == [[]]
    assert service.known("Hello") is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "fallback to char tokens" in caplog.text


def test_a_service_that_fails_leaves_characters(frontend: Frontend) -> None:
    heard = Heard()
    tokenizer(frontend).ask("Hello", heard)
    frontend.http.calls[0].sink.fail(ConnectFailed("nobody there"))
    assert heard == [[]]


def test_a_service_that_says_nothing_is_waited_for_so_long_and_no_longer(frontend: Frontend) -> None:
    heard = Heard()
    tokenizer(frontend).ask("Hello", heard)
    frontend.time.advance(1.9)
    assert heard == []
    frontend.time.advance(0.2)
    assert heard == [[]]
    assert frontend.http.calls[0].cancelled


def test_a_request_that_leaves_is_not_called_back(frontend: Frontend) -> None:
    heard = Heard()
    tokenizer(frontend).ask("Hello", heard).leave()
    frontend.time.advance(3)
    assert heard == []
    assert frontend.http.calls[0].cancelled


def test_what_is_remembered_is_bounded(frontend: Frontend) -> None:
    service = tokenizer(frontend)
    for number in range(REMEMBERED + 1):
        service.ask(str(number), Heard())
        sink = frontend.http.calls[-1].sink
        sink.start(200, [])
        sink.write(b'{"input_ids": [1]}')
        sink.finish()
    assert service.known("0") is None
    assert service.known("1") is not None


def test_only_policies_that_cut_prompts_ask(frontend: Frontend) -> None:
    def asks(policy: str, splitwise: bool = False) -> bool:
        tree = {"scheduler": {"tokenizer-url": "tok:80", "policy": policy}, "server": {"splitwise": splitwise}}
        config = build(tree)
        return Tokenizer.wanted(config, frontend.http, frontend.forwarder.loop) is not None

    assert asks("cache_aware")
    assert asks("remote_cache_aware")
    assert not asks("request_num")
    assert not asks("cache_aware", splitwise=True)


def test_a_request_waits_for_its_tokens_and_then_goes_its_way(frontend: Frontend) -> None:
    frontend.forwarder.tokenizer = service = tokenizer(frontend)
    forward = begun(frontend)
    (asked,) = frontend.http.calls
    assert asked.request.path == "/tokenize"
    asked.sink.start(200, [])
    asked.sink.write(b'{"input_ids": [1, 2]}')
    asked.sink.finish()
    assert frontend.http.calls[-1].instance.url == "http://a:1"
    assert list(service.known("Hello") or ()) == [1, 2]
    forward.cancel()
    assert not any(frontend.in_flight)


def test_a_client_that_leaves_while_its_prompt_is_cut_costs_nothing_more(frontend: Frontend) -> None:
    frontend.forwarder.tokenizer = tokenizer(frontend)
    forward = begun(frontend)
    forward.cancel()
    assert frontend.http.calls[0].cancelled
    frontend.time.advance(3)
    assert len(frontend.http.calls) == 1
    assert not any(frontend.in_flight)
