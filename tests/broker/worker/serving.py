"""An engine made with the SDK, in a thread with its own loop, so that tests can talk to it with blocking sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

from broker.worker import Request
from broker.worker.serve import Generate, serve_async
from tests.support.raw_native import RawFrontend, RawPenstock
from tests.support.waiting import PATIENCE_S, eventually


class Served:
    """A context manager; `hello` is what the engine registered with."""

    def __init__(self, penstock: RawPenstock, generate: Generate, *, epoch: int = 1, **options: Any) -> None:
        self._penstock = penstock
        self._epoch = epoch
        self._ready = threading.Event()
        self._failure: BaseException | None = None

        async def run() -> None:
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            self._ready.set()
            await serve_async(generate, router=penstock.url, stop=self._stop, **options)

        def thread() -> None:
            try:
                asyncio.run(run())
            except BaseException as e:
                self._failure = e

        self._thread = threading.Thread(target=thread)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)
        self.hello = self._penstock.accept(self._epoch)
        self.incarnation: bytes = self.hello[2]
        self.endpoint: str = self.hello[3]
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the engine has not ended"
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """As SIGTERM does."""
        self.call(self._stop.set)

    def call(self, function: Callable[[], object]) -> None:
        """On the engine's loop, if it still runs."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    def frontend(self, *, epoch: int = 1) -> RawFrontend:
        """Connected and welcome. A context manager."""
        frontend = RawFrontend(self.endpoint, self.incarnation)
        frontend.hello(epoch)
        return frontend


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
