"""What one request costs through each transport, beside plain references in the same run.

The engine runs in a process of its own, so that only this side is timed. `echo` is a bare socket doing the same
two system calls; `aiohttp` is what the HTTP transport would cost with a general client.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection
from typing import cast

import aiohttp
import msgpack
import pytest
import uvloop
import zmq
from pytest_benchmark.fixture import BenchmarkFixture

from broker.config import Config
from broker.errors import PenstockError
from broker.types import EngineKind, Instance
from frontend.upstream.base import Headers, Sink, Upstream, UpstreamRequest
from frontend.upstream.http import HttpUpstream
from frontend.upstream.zmq import ZmqUpstream

BODY = b'{"model": "m", "messages": [{"role": "user", "content": "' + b"x" * 960 + b'"}]}'
ANSWER = b'{"id": "1", "choices": [{"message": {"content": "' + b"y" * 400 + b'"}}]}'
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nServer: bench\r\nDate: today\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER)
)
REQUEST = UpstreamRequest(
    path="/v1/chat/completions",
    headers=[(b"content-type", b"application/json"), (b"accept", b"*/*"), (b"user-agent", b"bench/1")],
    body=BODY,
)
INCARNATION = b"i" * 16
SIDE_BY_SIDE = 32
ROUNDS = 10
"""Requests that each of the side-by-side clients makes in one timed round."""


class Client(Sink):
    """One client that asks again as soon as it has its answer, `ROUNDS` times."""

    def __init__(self, upstream: Upstream, instance: Instance, done: Callable[[], None]) -> None:
        self._upstream, self._instance, self._done = upstream, instance, done
        self._left = ROUNDS

    def ask(self) -> None:
        self._upstream.open(self._instance, REQUEST, self)

    def start(self, status: int, headers: Headers) -> None:
        assert status == 200

    def write(self, data: bytes) -> None:
        assert len(data) == len(ANSWER)

    def finish(self) -> None:
        self._left -= 1
        if self._left:
            self.ask()
        else:
            self._done()

    def fail(self, error: PenstockError) -> None:
        raise error


async def ask_all(upstream: Upstream, instance: Instance) -> None:
    finished = asyncio.get_running_loop().create_future()
    left = SIDE_BY_SIDE

    def done() -> None:
        nonlocal left
        left -= 1
        if not left:
            finished.set_result(None)

    for _ in range(SIDE_BY_SIDE):
        Client(upstream, instance, done).ask()
    await finished


@pytest.fixture
def engine() -> Iterator[tuple[int, str]]:
    """Port of an HTTP engine and endpoint of a native one, both in one process."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(30)
        yield ours.recv()
    finally:
        process.kill()
        process.join()
        ours.close()
        theirs.close()


Once = Callable[[], Awaitable[object]]


def timed(benchmark: BenchmarkFixture, stage: Callable[[], AbstractAsyncContextManager[Once]]) -> None:
    """Times rounds of SIDE_BY_SIDE x ROUNDS requests on one loop; what the stage set up is closed on the same loop."""

    async def enter(stack: AsyncExitStack) -> Once:
        return await stack.enter_async_context(stage())

    async def run(once: Once) -> None:
        await once()

    benchmark.extra_info["requests_per_round"] = SIDE_BY_SIDE * ROUNDS
    stack = AsyncExitStack()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        once = runner.run(enter(stack))
        benchmark.pedantic(lambda: runner.run(run(once)), rounds=20, warmup_rounds=2)
        runner.run(stack.aclose())


@pytest.mark.benchmark(group="upstream: 320 requests, 32 side by side")
def test_http_transport(benchmark: BenchmarkFixture, engine: tuple[int, str]) -> None:
    instance = Instance(url=f"http://127.0.0.1:{engine[0]}")

    @asynccontextmanager
    async def stage() -> AsyncIterator[Once]:
        upstream = HttpUpstream(Config())
        yield lambda: ask_all(upstream, instance)
        upstream.close()

    timed(benchmark, stage)


@pytest.mark.benchmark(group="upstream: 320 requests, 32 side by side")
def test_zmq_transport(benchmark: BenchmarkFixture, engine: tuple[int, str]) -> None:
    instance = Instance(url=engine[1], engine=EngineKind.NATIVE, incarnation=INCARNATION)

    @asynccontextmanager
    async def stage() -> AsyncIterator[Once]:
        upstream = ZmqUpstream(Config())
        yield lambda: ask_all(upstream, instance)
        upstream.close()

    timed(benchmark, stage)


class Echo(asyncio.Protocol):
    """Sends the same bytes again for whatever comes back, `ROUNDS` times."""

    MESSAGE = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def ask(self) -> asyncio.Future[None]:
        self.left = ROUNDS
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport.write(self.MESSAGE)
        return self.finished

    def data_received(self, data: bytes) -> None:
        self.left -= 1
        if self.left:
            self.transport.write(self.MESSAGE)
        else:
            self.finished.set_result(None)


@pytest.mark.benchmark(group="upstream: 320 requests, 32 side by side")
def test_reference_echo(benchmark: BenchmarkFixture, engine: tuple[int, str]) -> None:
    """The floor: one write and one read a request, nothing parsed."""

    @asynccontextmanager
    async def stage() -> AsyncIterator[Once]:
        loop = asyncio.get_running_loop()
        echoes = [(await loop.create_connection(Echo, "127.0.0.1", engine[0]))[1] for _ in range(SIDE_BY_SIDE)]
        yield lambda: asyncio.gather(*(echo.ask() for echo in echoes))
        for echo in echoes:
            echo.transport.abort()

    timed(benchmark, stage)


@pytest.mark.benchmark(group="upstream: 320 requests, 32 side by side")
def test_reference_aiohttp(benchmark: BenchmarkFixture, engine: tuple[int, str]) -> None:
    url = f"http://127.0.0.1:{engine[0]}/v1/chat/completions"

    @asynccontextmanager
    async def stage() -> AsyncIterator[Once]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=SIDE_BY_SIDE)) as session:

            async def client() -> None:
                for _ in range(ROUNDS):
                    async with session.post(url, data=BODY) as response:
                        assert len(await response.read()) == len(ANSWER)

            yield lambda: asyncio.gather(*(client() for _ in range(SIDE_BY_SIDE)))

    timed(benchmark, stage)


# -- the engine's process ----------------------------------------------------------------------------------


def serve(ready: Connection) -> None:
    asyncio.run(_serve(ready))


async def _serve(ready: Connection) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Answering, "127.0.0.1", 0)
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    welcome, pong = msgpack.packb([80, 1, INCARNATION]), msgpack.packb([81, INCARNATION])

    def drain() -> None:
        while router.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            route, frame, *_ = router.recv_multipart()
            match msgpack.unpackb(frame):
                case [64, *_]:
                    router.send_multipart([route, welcome])
                case [65, *_]:
                    router.send_multipart([route, pong])
                case [66, _, number, *_]:
                    step = [82, INCARNATION, [[number, 0, 1, ANSWER]]]
                    router.send_multipart([route, msgpack.packb(step)])

    loop.add_reader(router.getsockopt(zmq.FD), drain)
    ready.send((server.sockets[0].getsockname()[1], f"tcp://127.0.0.1:{port}"))
    await asyncio.Event().wait()


class _Answering(asyncio.Protocol):
    """Answers each time a whole body has come; it looks for its last bytes only."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if data.endswith(b'"}]}'):
            self.transport.write(RESPONSE)
