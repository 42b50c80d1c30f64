"""An engine made with the SDK, in a thread with its own loop, so that tests can talk to it with blocking sockets."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Self

from broker.worker.serve import Generate, serve_async
from tests.support.raw_native import RawFrontend, RawPenstock


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
        assert self._ready.wait(10)
        self.hello = self._penstock.accept(self._epoch)
        self.incarnation: bytes = self.hello[2]
        self.endpoint: str = self.hello[3]
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join(20)
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
