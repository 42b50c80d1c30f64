"""What the lean path, its log lines and its idle timer cost, each beside what it replaced. Sockets are left out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from pytest_benchmark.fixture import BenchmarkFixture

from broker import batched, log
from broker.config import Log
from broker.lines import Lines
from frontend.idle import IdleConnections
from tests.frontend.conformance import OK
from tests.frontend.test_conformance import Site
from tests.frontend.wire import PATHS, Wire
from tests.frontend.wire import Path as Way

BODY = b'{"model":"tiny","messages":[{"role":"user","content":"%s"}]}' % (b"some words " * 80)
REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\naccept: */*\r\nuser-agent: bench\r\nx-request-id: i\r\n"
REQUEST += b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY)
REQUESTS = 50


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner.get_loop()


@contextlib.contextmanager
def product_log(folder: Path) -> Iterator[None]:
    """The product's log, to a file, and no handler of pytest's beside it."""
    root, here = logging.getLogger(), Path.cwd()
    before = root.handlers[:], root.level
    root.handlers[:] = []
    os.chdir(folder)
    log.setup(Log(output="file"), "bench")
    yield
    for handler in root.handlers:
        handler.close()
    os.chdir(here)
    root.handlers[:] = before[0]
    root.setLevel(before[1])


@pytest.mark.benchmark(group=f"{REQUESTS} requests")
@pytest.mark.parametrize("way", PATHS)
def test_requests(benchmark: BenchmarkFixture, tmp_path: Path, loop: asyncio.AbstractEventLoop, way: Way) -> None:
    """From the bytes of a request to those of its answer, one after the other on one connection."""
    site = Site(tmp_path)

    async def connect() -> Wire:
        return site.connect(way)

    async def requests() -> None:
        for _ in range(REQUESTS):
            wire.transport.pieces.clear()
            wire.feed(REQUEST)
            for _ in range(100):  # turns
                if wire.transport.pieces:
                    break
                await asyncio.sleep(0)
            assert wire.out == OK

    wire = loop.run_until_complete(connect())
    with product_log(tmp_path):
        batched.start(loop)
        benchmark(lambda: loop.run_until_complete(requests()))
    site.frontend.close()


@pytest.mark.benchmark(group="log line")
@pytest.mark.parametrize("way", ["through logging", "batched"])
def test_log_line(benchmark: BenchmarkFixture, tmp_path: Path, loop: asyncio.AbstractEventLoop, way: str) -> None:
    lines = Lines("penstock.access")
    with product_log(tmp_path):
        if way == "batched":
            batched.start(loop)
        benchmark(lambda: lines.write(f"id={'abc'} path={'/v1/completions'} status={200}"))


@pytest.mark.benchmark(group="idle timer")
@pytest.mark.parametrize("way", ["call_later", "shared"])
def test_idle_timer(benchmark: BenchmarkFixture, loop: asyncio.AbstractEventLoop, way: str) -> None:
    """Armed and disarmed once, as for every request on a kept connection."""

    class Idler:
        def idled(self) -> None: ...

    idler, shared = Idler(), IdleConnections(loop, 75.0)
    silence = shared.watch(idler)

    def each() -> None:
        loop.call_later(75.0, idler.idled).cancel()

    def together() -> None:
        silence.begin()
        silence.end()

    run: Callable[[], None] = each if way == "call_later" else together
    benchmark(run)
    shared.close()
