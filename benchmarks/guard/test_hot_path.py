"""The cost of a request and of a stream's event must not creep up.

Everything from the parsed bytes to the client's sink is the real thing: body, view, policy, lease, forwarding,
counters, log line; only sockets are not. Each bound is what was measured when it was set, times some room. Whoever
needs more must say so by changing a number here; whoever makes it cheaper lowers it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.guard.yardstick import Reference, Work, bytecode_ratio, cpu_ratio
from broker.errors import PenstockError
from broker.types import RouteRequest
from frontend import body
from frontend.upstream.base import Headers, Sink, UpstreamRequest
from tests.frontend.fakes import Frontend

INSTANCES = 8
BODY = b'{"model":"tiny","messages":[{"role":"user","content":"%s"}],"stream":true}' % (b"some words " * 90)
HEADERS: Headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'


class Cost(NamedTuple):
    """In reference loops, as measured when the bounds were set."""

    bytecodes: float
    cpu: float


REQUEST = Cost(bytecodes=3.53, cpu=10.2)
EVENT_COST = Cost(bytecodes=0.062, cpu=0.050)
BYTECODES_ROOM = 1.25
"""They repeat to the last one, so this is room for honest small changes only."""
CPU_ROOM = 2.0
"""Nine runs on two cores shared with seven busy neighbours gave 9.3 to 11.4 for a request, 0.048 to 0.052 an event."""


class Client:
    """A client that wants everything and keeps nothing."""

    def start(self, status: int, headers: Headers) -> None: ...
    def write(self, data: bytes) -> None: ...
    def finish(self) -> None: ...

    def fail(self, error: PenstockError) -> None:
        raise error


@pytest.fixture
def access_log() -> Iterator[None]:
    """The log line of every request is formatted, as in service, and goes nowhere."""
    logger, handler = logging.getLogger("penstock.access"), _Formatting()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


class _Formatting(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        self.format(record)


@pytest.fixture
def request_and_event(tmp_path: Path, access_log: None) -> Iterator[tuple[Work, Work]]:
    """One whole request of one event, and one more event of a stream that is open."""
    urls = [f"http://10.0.0.{i}:8000" for i in range(INSTANCES)]
    client = Client()
    with Frontend(tmp_path, *urls) as frontend:

        def begin() -> Sink:
            read = body.parse(BODY)
            text, tokens = read.text()
            route = RouteRequest(model=read.model, prompt=text, prompt_tokens=tokens)
            request = UpstreamRequest(path="/v1/chat/completions", headers=[], body=BODY, stream=bool(read.stream))
            frontend.forwarder.forward(b"5b1d3c9e", route, request, client).begin()
            engine = frontend.http.calls.pop().sink
            engine.start(200, HEADERS)
            engine.write(EVENT)
            return engine

        def whole() -> None:
            begin().finish()

        whole()
        stream = begin()
        yield whole, lambda: stream.write(EVENT)
        stream.finish()


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """The garbage of other tests is not ours to pay for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def judge(what: str, measured: float, bound: float) -> None:
    """The figure is printed too (see it with -s), for whoever sets the next bound."""
    print(f"{what}: {measured:.3f} reference loops, at most {bound:.3f}")
    assert measured <= bound, f"{what} costs {measured:.3f} reference loops; when the bound was set it was less by far"


def test_bytecodes_of_a_request(request_and_event: tuple[Work, Work]) -> None:
    judge(
        "bytecodes of a request", bytecode_ratio(request_and_event[0], Reference()), BYTECODES_ROOM * REQUEST.bytecodes
    )


def test_bytecodes_of_an_event(request_and_event: tuple[Work, Work]) -> None:
    judge(
        "bytecodes of an event",
        bytecode_ratio(request_and_event[1], Reference()),
        BYTECODES_ROOM * EVENT_COST.bytecodes,
    )


def test_cpu_of_a_request(request_and_event: tuple[Work, Work]) -> None:
    judge("CPU of a request", cpu_ratio(request_and_event[0], Reference(), times=200), CPU_ROOM * REQUEST.cpu)


def test_cpu_of_an_event(request_and_event: tuple[Work, Work]) -> None:
    judge("CPU of an event", cpu_ratio(request_and_event[1], Reference(), times=500), CPU_ROOM * EVENT_COST.cpu)


def test_the_yardstick_sees_doubled_work() -> None:
    reference = Reference()

    def twice() -> None:
        reference()
        reference()

    assert bytecode_ratio(twice, reference) == pytest.approx(2, rel=0.02)
    assert 1.6 < cpu_ratio(twice, reference, times=200) < 2.5
