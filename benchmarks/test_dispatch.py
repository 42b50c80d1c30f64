"""What a request costs before it leaves: the parse at the edge, and the choice. Not the sockets.

The parse at the edge is msgspec's because of these numbers: of a body it builds only what is asked for.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgpack
import msgspec
import orjson
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from broker import wire
from broker.config import Scheduler
from broker.counters import FrontendCounters, attach_counters
from broker.prefix import PrefixIndex, PrefixWriter, create_prefix, run_layout
from broker.route import RouteRequest
from broker.types import Role
from frontend import body
from frontend.breaker import Breaker
from frontend.dispatch import Dispatcher, make_policies
from frontend.forwarder import Forwarder
from frontend.upstream.base import Headers, Sink, Upstream, UpstreamRequest
from tests.support.table import Run

REQUEST = RouteRequest(model="tiny", prompt_tokens=256)


def chat(size: int) -> bytes:
    """A chat body of about `size` bytes: a system prompt, turns, and a few settings."""
    words = "the quick brown fox jumps over the lazy dog " * (size // 44 + 1)
    turns = [{"role": ("user", "assistant")[n % 2], "content": words[: size // 4]} for n in range(3)]
    messages = [{"role": "system", "content": words[: size // 4]}, *turns]
    return json.dumps({"model": "tiny", "messages": messages, "stream": True, "temperature": 0.7}).encode()


BODIES = {"1KiB": chat(1024), "32KiB": chat(32 * 1024)}


@pytest.mark.benchmark(group="edge-parse")
@pytest.mark.parametrize("size", BODIES)
@pytest.mark.parametrize("parser", ["msgspec", "orjson", "json"])
def test_edge_parse(benchmark: BenchmarkFixture, parser: str, size: str) -> None:
    parse: Any = {"msgspec": body.parse, "orjson": orjson.loads, "json": json.loads}[parser]
    benchmark(parse, BODIES[size])


@pytest.mark.benchmark(group="edge-parse")
@pytest.mark.parametrize("size", BODIES)
def test_edge_parse_and_text(benchmark: BenchmarkFixture, size: str) -> None:
    benchmark(lambda: body.parse(BODIES[size]).text())


class Fleet:
    """A table with `count` instances, and everything up to the transport."""

    def __init__(self, path: Path, count: int) -> None:
        self.run = Run(path, slots=max(count, 16), frontends=4)
        for n in range(count):
            self.run.admit(f"http://10.0.{n >> 8}.{n & 255}:8000", "tiny")
        for row in range(1, 4):
            self.run.frontend(row)
        counters = self.run.frontend(0)
        self.dispatcher = Dispatcher(self.run.reader, counters, make_policies(self.run.config, 0), Breaker(3, 5.0))
        silent = Silent()
        loop = cast("asyncio.AbstractEventLoop", silent)
        self.forwarder = Forwarder(self.run.config, self.dispatcher, counters, silent, silent, loop)


class Silent(Upstream):
    """A transport, a call, a loop: all of them do nothing, at the cost of a call."""

    def open(self, instance: object, request: object, sink: object) -> Silent:
        return self

    def call_later(self, delay: float, call: object) -> Silent:
        return self

    def cancel(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def close(self) -> None: ...


class Nobody(Sink):
    """A client that does not listen."""

    def start(self, status: int, headers: Headers) -> None: ...

    def write(self, data: bytes) -> None: ...

    def fail(self, error: object) -> None: ...

    def finish(self) -> None: ...


@pytest.fixture
def fleet(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    it = Fleet(tmp_path, request.param)
    yield it
    it.run.__exit__()


@pytest.mark.benchmark(group="dispatch")
@pytest.mark.parametrize("fleet", [8, 64, 1024], indirect=True)
def test_choose_and_close(benchmark: BenchmarkFixture, fleet: Fleet) -> None:
    """View, policy (request_num), lease, and the lease's end; 4 live frontends."""
    benchmark(lambda: fleet.dispatcher.choose(REQUEST, (), 0.0).lease.close())


@pytest.mark.benchmark(group="dispatch")
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("fleet", [8, 64, 1024], indirect=True)
def test_choose_by_prompt_and_close(benchmark: BenchmarkFixture, fleet: Fleet, known: bool) -> None:
    """The same by `prefix_cost`, for a prompt of 32 KiB in 64-character blocks; `known`: somebody has had it."""
    config = msgspec.structs.replace(fleet.run.config, scheduler=Scheduler())
    create_prefix(fleet.run.path, run_layout(config))
    slots: list[int] = fleet.run.reader.view(Role.MIXED, "tiny").slots.tolist()
    writer = PrefixWriter.attach(fleet.run.path, run_layout(config), dict.fromkeys(slots, 1))
    index = PrefixIndex.of_run(fleet.run.path, config, 0)
    dispatcher = Dispatcher(
        fleet.run.reader,
        FrontendCounters(attach_counters(fleet.run.path, config), 0),
        make_policies(config, 0, index),
        Breaker(3, 5.0),
    )
    numbers = itertools.count()
    text = "the quick brown fox jumps over the lazy dog " * 745

    def life() -> None:
        prompt = text if known else f"{next(numbers)} {text}"
        request = RouteRequest(model="tiny", prompt_tokens=8192, prompt=prompt)
        dispatcher.choose(request, (), 0.0).lease.close()

    def deliver() -> None:
        while notices := index.batch():
            writer.apply(notices)

    life()
    benchmark.pedantic(life, setup=deliver, rounds=1000)


@pytest.mark.benchmark(group="forward")
@pytest.mark.parametrize("fleet", [8], indirect=True)
@pytest.mark.parametrize("chunks", [1, 64])
def test_forward_a_request(benchmark: BenchmarkFixture, fleet: Fleet, chunks: int) -> None:
    """A whole life in `Forward`, transport and client left out; the log line too."""
    request = UpstreamRequest(path="/v1/chat/completions", headers=[], body=b"{}")
    client = Nobody()

    def life() -> None:
        forward = fleet.forwarder.forward(b"id", REQUEST, request, client)
        forward.begin()
        forward.start(200, [])
        for _ in range(chunks):
            forward.write(b"data: {}\n\n")
        forward.finish()

    benchmark(life)


REPLY: dict[str, Any] = {"call": 7, "status": 200, "body": b'{"code": 200}' * 8}
PLAIN = msgspec.to_builtins(wire.Reply(**REPLY), builtin_types=(bytes,))


@pytest.mark.benchmark(group="control-codec")
def test_codec_msgspec(benchmark: BenchmarkFixture) -> None:
    """What the control socket uses: encoding, and decoding with checks of shape."""
    message = wire.Reply(**REPLY)
    benchmark(lambda: wire.decode(wire.to_frontend, wire.encode(message)))


@pytest.mark.benchmark(group="control-codec")
def test_codec_msgpack(benchmark: BenchmarkFixture) -> None:
    benchmark(lambda: msgpack.unpackb(msgpack.packb(PLAIN)))


@pytest.mark.benchmark(group="control-codec")
def test_codec_orjson(benchmark: BenchmarkFixture) -> None:
    """JSON has no bytes: they go as text."""
    message = {**REPLY, "body": REPLY["body"].decode()}
    benchmark(lambda: orjson.loads(orjson.dumps(message)))
