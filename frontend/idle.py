"""Tells connections that have heard nothing of their client for a while: one timer for all of them.

uvicorn arms and cancels a timer of the loop for every answer; with this one a kept-alive request pays for two
operations on a dict instead, which is half of it (benchmarks/test_lean.py).
"""

from __future__ import annotations

import asyncio
from typing import Protocol


class Idler(Protocol):
    def idled(self) -> None:
        """Its client has said nothing for too long."""


class IdleConnections:
    """Owned by the server; entered and left by the connections themselves."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit_s: float) -> None:
        self._loop = loop
        self._time = loop.time
        self._limit_s = limit_s
        self._since: dict[Idler, float] = {}
        """In order of entering, so that the first has been idle longest."""
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._since)

    def enter(self, connection: Idler) -> None:
        """From now on it waits for its client: for a request, or for the rest of one."""
        self.leave(connection)
        self._since[connection] = self._time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._limit_s, self._reap)

    def leave(self, connection: Idler) -> None:
        """It waits no more, or is gone. Idempotent."""
        if connection in self._since:
            del self._since[connection]

    def close(self) -> None:
        self._since.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _reap(self) -> None:
        self._timer = None
        oldest_kept = self._loop.time() - self._limit_s
        for connection, since in list(self._since.items()):
            if since > oldest_kept:
                self._timer = self._loop.call_later(since - oldest_kept, self._reap)
                break
            del self._since[connection]
            connection.idled()
