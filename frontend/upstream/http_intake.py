"""Reads the sockets of all HTTP engines whose answers flow, past their transports: one reader of the loop for all.

A transport reads one socket for each callback; of some hundred streams in turn that is half of what an event costs.
Here one callback reads all that have something, then sends it on.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from frontend import conduit

if TYPE_CHECKING:
    from frontend._conduit import Conduit
    from frontend.upstream.http_connection import Connection


class HttpIntake:
    """One per process, used on the loop's thread alone. Nothing joins where the short way is not compiled."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._intake: Any = None  # made when it is needed
        self._closed = False

    def join(self, joining: Conduit, socket: int, connection: Connection) -> bool:
        """From now on what comes goes that way; the connection is told when that is over by its `parted`, and leaves
        before it does anything else. `socket`: the engine's. False: it stays as it is."""
        if self._intake is None:
            if self._closed or conduit.compiled is None:
                return False
            self._intake = conduit.compiled.Intake()
            self._loop.add_reader(self._intake.fileno(), self._turn)
        joined: bool = self._intake.join(joining, socket, connection)
        return joined

    def leave(self, leaving: Conduit) -> None:
        """Idempotent."""
        if self._intake is not None:
            self._intake.leave(leaving)

    def close(self) -> None:
        """Once all have left."""
        self._closed = True
        if self._intake is not None:
            self._loop.remove_reader(self._intake.fileno())
            self._intake = None

    def _turn(self) -> None:
        parted = self._intake.turn(time.monotonic())
        if parted is not None:
            for connection, read, unsent in parted:
                connection.parted(read, unsent)
