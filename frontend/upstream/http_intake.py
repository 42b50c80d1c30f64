"""Reads the sockets of all HTTP engines whose answers flow, past their transports: one reader of the loop for all.

A transport reads one socket for each callback; of some hundred streams in turn that is half of what an event costs.
Here one callback reads all that have something, then sends it on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from frontend import conduit

if TYPE_CHECKING:
    from frontend._conduit import Conduit
    from frontend.upstream.http_connection import Connection

log = logging.getLogger(__name__)


class HttpIntake:
    """One per process, used on the loop's thread alone. Nothing joins where the short way is not compiled."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._intake: Any = None  # made when it is needed
        self._is_open = conduit.compiled is not None  # it may be made

    def join(self, joining: Conduit, socket: int, connection: Connection) -> bool:
        """From now on what comes goes that way; the connection is told when that is over by its `parted`, and leaves
        before it does anything else. `socket`: the engine's. False: it stays as it is."""
        if self._intake is None and not (self._is_open and self._open()):
            return False
        joined: bool = self._intake.join(joining, socket, connection)
        return joined

    def leave(self, leaving: Conduit) -> None:
        """Idempotent."""
        if self._intake is not None:
            self._intake.leave(leaving)

    def close(self) -> None:
        """Once all have left."""
        self._is_open = False
        if self._intake is not None:
            self._loop.remove_reader(self._intake.fileno())
            self._intake = None

    def _open(self) -> bool:
        """False: the kernel grants nothing to wait with, and all goes the long way from here on."""
        assert conduit.compiled is not None
        try:
            self._intake = conduit.compiled.Intake()
        except OSError as e:
            log.warning("streams of HTTP engines go the long way, as there is no descriptor for the short one: %s", e)
            self._is_open = False
            return False
        self._loop.add_reader(self._intake.fileno(), self._turn)
        return True

    def _turn(self) -> None:
        parted = self._intake.turn(time.monotonic())
        if parted is not None:
            for connection, read, unsent in parted:
                try:
                    connection.parted(read, unsent)
                except Exception as e:  # as transports do: a bug in one client's sink must not cost the others' bytes
                    self._loop.call_exception_handler({"message": f"{connection} could not go on", "exception": e})
                    connection.break_off()
