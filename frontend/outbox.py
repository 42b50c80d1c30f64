"""What a turn of the event loop has to write: kept until everything that had come is read, then written in one burst.

    read, decide, put | read, decide, put | ...  -> flush: write, write, ...

A write wakes whoever waits at the other end. Between one read and the next it finds its reader asleep each time, and
waking it (on another core by an interrupt, which under a hypervisor is dearer than all else in a write) is part of its
price. In a burst the reader is still busy with the last one when the next comes.

Bought: docs/performance.md, section 6.
"""

from __future__ import annotations

import asyncio
from typing import Final

MOST: Final = 64
"""Writes kept at once: those that came first do not wait for hundreds of others."""


class Outbox:
    """One per process, used on the loop's thread alone; what connections have put, in that order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._kept: list[tuple[Outlet, bytes]] = []
        self._written = 0  # of those kept; when all are, none is kept (a deque's methods take three times as long)
        self._is_due = False

    def __repr__(self) -> str:
        return f"<Outbox {len(self._kept) - self._written} to write>"

    def put(self, outlet: Outlet, data: bytes) -> None:
        self._kept.append((outlet, data))
        if len(self._kept) - self._written >= MOST:
            self.flush()
        elif not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._flush)

    def flush(self) -> None:
        """Writes now. A write may call back, and that put more or flush: the order stays."""
        kept = self._kept
        try:
            while self._written < len(kept):
                outlet, data = kept[self._written]
                self._written += 1
                outlet.held -= 1
                if not outlet.transport.is_closing():
                    outlet.transport.write(data)
        finally:  # one that fails must not keep the others' bytes back
            if self._written == len(kept):
                kept.clear()
                self._written = 0
            elif not self._is_due:
                self._is_due = True
                self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_due = False
        self.flush()


class Outlet:
    """A connection's way out. Who writes to its transport otherwise, or closes it, flushes the outbox first."""

    def __init__(self, transport: asyncio.WriteTransport, outbox: Outbox) -> None:
        self.transport = transport
        self.held = 0
        """Writes that are kept."""
        self._outbox = outbox

    def write(self, data: bytes) -> None:
        """At the end of the turn; nothing, if the connection has ended by then."""
        self.held += 1
        self._outbox.put(self, data)
