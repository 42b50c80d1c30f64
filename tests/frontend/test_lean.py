"""What goes the short way to a client (whole answers and chunks) is, byte for byte, what the long way makes of it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.config import Server
from broker.errors import UpstreamBroken
from frontend.api import Inference
from frontend.forward import Forward
from frontend.upstream.base import AnswerHead, Headers
from tests.frontend.fakes import Frontend
from tests.frontend.wire import PATHS, Wire
from tests.frontend.wire import Path as Way

BODY = b'{"model":"tiny","prompt":"x"}'
REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
REQUESTS = {
    "kept": REQUEST,
    "closed": REQUEST.replace(b"Host", b"Connection: close\r\nHost"),
    "HTTP/1.0": REQUEST.replace(b"1.1", b"1.0"),
}
JSON: Headers = [
    (b"date", b"today"),
    (b"content-type", b"application/json"),
    (b"content-length", b"2"),
    (b"x-request-id", b"the engine's"),
    (b"x-more", b"100%d"),
]
EVENTS: Headers = [(b"content-type", b"text/event-stream")]


@pytest.fixture(params=["penstock", "fd-router"], ids=["named", "unnamed"])
def frontend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Frontend]:
    with Frontend(tmp_path, "http://10.0.0.1:80", server=Server(compat=request.param)) as frontend:
        yield frontend


def clients_bytes(frontend: Frontend, way: Way, request: bytes, *answers: Callable[[Forward], None]) -> list[bytes]:
    """Of one connection for all requests, or one for each where it is not kept."""

    async def run() -> list[bytes]:
        inference = Inference(frontend.config, frontend.forwarder)
        wire = Wire(frontend, way, inference)
        found = []
        for answer in answers:
            if wire.transport.is_closing():
                wire = Wire(frontend, way, inference)
            wire.transport.pieces.clear()
            wire.feed(request)
            await wire.settle()
            call = frontend.http.last
            assert isinstance(call.sink, Forward)
            answer(call.sink)
            await wire.settle()
            found.append(re.sub(rb"x-request-id: [0-9a-f]{24}\r", b"x-request-id: made\r", wire.out))
        wire.close()
        return found

    return asyncio.run(run())


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("way", PATHS)
def test_a_whole_answer(frontend: Frontend, way: Way, request_: str) -> None:
    head = AnswerHead(JSON)

    def in_steps(sink: Forward) -> None:
        sink.start(200, head.fitting(b"0123456789"))
        sink.write(b"0123456789")
        sink.finish()

    def at_once(sink: Forward) -> None:
        sink.answer(head, b"0123456789")

    first, *others = clients_bytes(frontend, way, REQUESTS[request_], in_steps, at_once, at_once)
    assert others == [first, first]
    assert b"content-length: 10\r\n" in first
    assert not frontend.forwarder.live
    assert not any(frontend.in_flight)


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("ends", ["whole", "cut within an event", "cut behind an event"])
def test_whole_chunks(frontend: Frontend, way: Way, request_: str, ends: str) -> None:
    events = [b"data: 1\n\n", b"data: 2\n\n", b"data: 3" if ends == "cut within an event" else b"data: 3\n\n"]

    def end(sink: Forward) -> None:
        if ends == "whole":
            sink.finish()
        else:
            sink.fail(UpstreamBroken("gone"))

    def in_steps(sink: Forward) -> None:
        sink.start(200, EVENTS)
        for event in events:
            sink.write(event)
        end(sink)

    def as_chunks(sink: Forward) -> None:
        sink.start(200, EVENTS)
        for event in events:
            sink.chunk(b"%x\r\n%b\r\n" % (len(event), event), len(event))
        end(sink)

    def some_of_each(sink: Forward) -> None:
        sink.start(200, EVENTS)
        sink.write(events[0])
        for event in events[1:]:
            sink.chunk(b"%x\r\n%b\r\n" % (len(event), event), len(event))
        end(sink)

    first, *others = clients_bytes(frontend, way, REQUESTS[request_], in_steps, as_chunks, some_of_each)
    assert others == [first, first]
    assert events[-1] in first
