"""Tells connections that have heard nothing of their client for a while: one timer for all of them.

uvicorn arms and cancels a timer of the loop for every answer. Here a kept connection only notes when its silence began,
and all of them are looked through a few times within the limit (benchmarks/test_lean.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

LOOKS = 4
"""Within the limit: a silence may last a quarter longer."""
_NEVER: Final = float("inf")


class Idler(Protocol):
    def idled(self) -> None:
        """Its client has said nothing for too long."""


class Silence:
    """Of a connection's client, begun and ended by the connection itself."""

    __slots__ = ("_time", "since")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._time = clock
        self.since = _NEVER
        """By the loop's clock; infinity while there is none."""

    def begin(self) -> None:
        """From now on the connection waits for its client: for a request, or for the rest of one."""
        self.since = self._time()

    def end(self) -> None:
        """It waits no more. Idempotent."""
        self.since = _NEVER


class IdleConnections:
    """Owned by the server, which shares it among all connections."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit_s: float) -> None:
        self._loop = loop
        self._limit_s = limit_s
        self._open: dict[Silence, Idler] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Connections that wait for their clients."""
        return sum([silence.since < _NEVER for silence in self._open])

    def watch(self, connection: Idler) -> Silence:
        """Of a new connection, begun; looked at until `forget`."""
        silence = Silence(self._loop.time)
        silence.begin()
        self._open[silence] = connection
        if self._timer is None:
            self._timer = self._loop.call_later(self._limit_s / LOOKS, self._look)
        return silence

    def forget(self, silence: Silence) -> None:
        """Its connection is gone. Idempotent."""
        silence.end()
        self._open.pop(silence, None)

    def close(self) -> None:
        self._open.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._open:
            self._timer = self._loop.call_later(self._limit_s / LOOKS, self._look)
        latest = self._loop.time() - self._limit_s
        for silence in [silence for silence in self._open if silence.since <= latest]:
            connection = self._open.get(silence)  # the end of one may have been that of others
            silence.end()
            if connection is not None:
                connection.idled()
