"""Distinct prompts without end, through a running router: it goes on serving, and its memory stays flat.

FastDeploy's router stands still for good at the 200,000th node of its tree. Every prompt here is one that nobody has
sent before, and of several blocks.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import uvloop

from tests.blackbox.router import Router
from tests.support.waiting import PATIENCE_S

PROMPTS = 300_000
CONNECTIONS = 16
WARM = 50_000
"""Of them; by then everything that grows once has grown."""
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class FastEngine(asyncio.Protocol):
    """Healthy, and says `{}` to everything: heads and bodies come in one piece from a router."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        self._rest += data
        while (end := self._rest.find(b"\r\n\r\n")) >= 0:
            head = self._rest[:end].lower()
            start = head.find(b"content-length:")
            length = int(head[start + 15 :].split(b"\r\n", 1)[0]) if start >= 0 else 0
            if len(self._rest) < end + 4 + length:
                return
            self._rest = self._rest[end + 4 + length :]
            self._transport.write(ANSWER)  # type: ignore[attr-defined]  # a Transport; uvloop's is no subclass


class EngineThread:
    """Owns its loop and its port."""

    def __init__(self) -> None:
        self._loop = uvloop.new_event_loop()
        self._server = self._loop.run_until_complete(self._loop.create_server(FastEngine, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        self._loop.run_until_complete(self._server.wait_closed())
        self._loop.close()


@pytest.fixture
def engines() -> Iterator[list[EngineThread]]:
    found = [EngineThread() for _ in range(2)]
    yield found
    for engine in found:
        engine.close()


def resident(router: Router) -> int:
    """Bytes of the router's processes; shared memory is in it, and is full from the beginning."""
    processes = [psutil.Process(router.process.pid), *psutil.Process(router.process.pid).children(recursive=True)]
    return sum(process.memory_info().rss for process in processes)


async def ask(port: int, numbers: range) -> int:
    """One connection, one prompt after another; how many were answered with 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    served = 0
    try:
        for number in numbers:
            # 40 characters that differ from the first on: ten blocks, none of them shared.
            body = b'{"prompt": "%s"}' % (f"{number:08x}"[::-1] * 5).encode()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: r\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            )
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
            await reader.readexactly(2)
            served += head.startswith(b"HTTP/1.1 200")
    finally:
        writer.close()
    return served


async def ask_all(port: int, numbers: range) -> int:
    parts = [numbers[k::CONNECTIONS] for k in range(CONNECTIONS)]
    return sum(await asyncio.gather(*(ask(port, part) for part in parts)))


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_serving_goes_on_and_memory_is_flat(tmp_path: Path, engines: list[EngineThread]) -> None:
    config = {
        "scheduler": {"policy": "cache_aware", "cache-block-size": 4, "load-balance-weight": 0.05},
        "log": {"level": "error"},
    }
    with Router(tmp_path, config=config) as router:
        for engine in engines:
            fields = {"role": "mixed", "host_ip": "127.0.0.1", "port": engine.port}
            assert router.post("/register", fields).status == 200

        def send(numbers: range) -> None:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                assert runner.run(ask_all(router.port, numbers)) == len(numbers)

        send(range(WARM))
        before = resident(router)
        send(range(WARM, PROMPTS))
        after = resident(router)
        # Two and a half million blocks later; a tree that kept 64 bytes of each would have grown by 160 MB.
        assert after < 1.1 * before, (before, after)
        assert router.err == ""
