"""The limits of one request: each is a timer under a name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable


class Timers:
    """Owned by the request; `clear` when it ends."""

    __slots__ = ("_loop", "_running")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._running: dict[Hashable, asyncio.TimerHandle] = {}

    def __contains__(self, name: Hashable) -> bool:
        return name in self._running

    def start(self, name: Hashable, seconds: float, call: Callable[[], None]) -> None:
        """In the place of a running one."""
        self.stop(name)
        self._running[name] = self._loop.call_later(seconds, call)

    def stop(self, name: Hashable) -> None:
        timer = self._running.pop(name, None)
        if timer is not None:
            timer.cancel()

    def clear(self, keep: Hashable = None) -> None:
        for name in list(self._running):
            if name != keep:
                self.stop(name)
