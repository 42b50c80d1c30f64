"""What a turn of the event loop has to write: kept until everything that had come is read, then written in one burst.

    read, decide, put | read, decide, put | ...  -> flush: write, write, ...

A write wakes whoever waits at the other end. Between one read and the next it finds its reader asleep each time, and
waking it (on another core by an interrupt, which under a hypervisor is dearer than all else in a write) is part of its
price. In a burst the reader is still busy with the last one when the next comes.

Bought: docs/performance.md, section 6.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from frontend import conduit
from frontend.sending import NONE, descriptor, send

if TYPE_CHECKING:
    from frontend._conduit import Conduit

MOST: Final = 64
"""Writes kept at once: those that came first do not wait for hundreds of others."""
JOIN_BYTES: Final = 16 * 1024
"""Two writes in a row to one connection become one up to this size; above, copying costs more than a system call."""


class Outbox:
    """One per process, used on the loop's thread alone; what connections have put, in that order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._outlets: list[Outlet] = []
        self._data: list[bytes] = []  # what each has to write
        self._written = 0  # of those kept; when all are, none is kept (a deque's methods take three times as long)
        self._is_due = False

    def __repr__(self) -> str:
        return f"<Outbox {len(self._outlets) - self._written} to write>"

    def put(self, outlet: Outlet, data: bytes) -> None:
        outlets = self._outlets
        # The end of an answer right behind its last bytes, most often: one write for both.
        if outlet.held and outlets and outlets[-1] is outlet and len(outlets) > self._written:
            last = self._data[-1]
            if len(last) + len(data) <= JOIN_BYTES:
                self._data[-1] = last + data
                return
        outlet.held += 1
        outlets.append(outlet)
        self._data.append(data)
        if len(outlets) - self._written >= MOST:
            self.flush()
        elif not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._flush)

    def flush(self) -> None:
        """Writes now. A write may call back, and that put more or flush: the order stays."""
        outlets, data = self._outlets, self._data
        try:
            while self._written < len(outlets):
                at = self._written
                self._written = at + 1
                outlets[at].send(data[at])
        finally:  # one that fails must not keep the others' bytes back
            if self._written == len(outlets):
                outlets.clear()
                data.clear()
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
        self._socket = descriptor(transport)
        self._conduit: Conduit | None = None

    def write(self, data: bytes) -> None:
        """At the end of the turn; nothing, if the connection has ended by then."""
        self._outbox.put(self, data)

    def send(self, data: bytes) -> None:
        """The outbox's: now."""
        transport = self.transport
        self.held -= 1
        if transport.is_closing():
            return
        if send is not None and self._socket != NONE and not transport.get_write_buffer_size():
            sent = send(self._socket, data)
            if sent == len(data):
                return
            data = data[sent:]
        transport.write(data)

    def conduit(self) -> Conduit | None:
        """The short way to this socket, for who writes nothing else meanwhile. None: it is the transport's turn."""
        transport, compiled = self.transport, conduit.compiled
        if compiled is None or self._socket == NONE or transport.get_write_buffer_size():
            return None
        if self.held:
            self._outbox.flush()
        if self.held or transport.is_closing() or transport.get_write_buffer_size():
            return None
        made: Conduit = compiled.Conduit(self._socket)
        self._conduit = made
        return made

    def rest(self, data: bytes) -> None:
        """What a conduit could not send, before anything else is written."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """The transport is gone, and its socket will soon be another's: no conduit may use it."""
        if self._conduit is not None:
            self._conduit.close()
            self._conduit = None
