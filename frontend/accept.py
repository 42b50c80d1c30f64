"""Accepting connections on a socket that all frontends share, so that each gets its part.

Every frontend is woken by every connection, and whoever is first takes it. Left alone, one frontend swallows a burst:
uvicorn's own loop takes all that is there in one go, and streams stay where they were taken, for minutes. So here

* one connection is taken per wake, and
* a frontend that holds clearly more connections than another one waits a moment before it takes the next. If it is
  still there then, it is taken whatever the others do: fairness is a preference, an answer is a duty. If the others
  leave it again and again (one of them may be stopped), more and more are taken after each wait.

The open connections of each frontend stand in its own row of totals, which every other one reads.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

from broker.counters import CountersReader, TotalColumn
from shm.segment import Segment

logger = logging.getLogger("frontend.accept")

YIELD_S = 0.0015
"""Long enough for an idle frontend to wake and take the connection; nobody notices it in a connect."""
MARGIN = 2
"""Connections more than the emptiest frontend that are still even; plus an eighth of its own."""
PATIENCE = 8
"""Waits in a row after which the next connection was still there, until more than one is taken after each. A neighbour
that is only busy has had 12 ms by then."""
DOUBLINGS = 6
"""From then on twice as many after each wait, at most 64."""
NO_ROOM_S = 0.1
"""Pause after the system refused a file descriptor; the connection waits in the backlog."""


class Acceptor:
    """Takes connections off the listening socket and hands them to the server's protocol. Owned by the process."""

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        is_ahead: Callable[[int], bool],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """`is_ahead` says whether another frontend should rather take the next connection; it is told how many this
        one has taken that are not counted yet."""
        self._listener = listener
        self._protocol = protocol
        self._is_ahead = is_ahead
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._in_vain = 0  # waits in a row that emptied nothing
        self._handing_over: set[asyncio.Task[object]] = set()
        self._stopped = False

    def start(self) -> None:
        self._listener.setblocking(False)
        self._listen()

    def stop(self) -> None:
        """Takes what is already in the backlog, then lets go of the listening socket. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        self._unlisten()
        while self._accept():
            pass
        self._listener.close()

    async def settled(self) -> None:
        """Returns when every connection taken has its protocol."""
        if self._handing_over:
            await asyncio.wait(self._handing_over)

    def _listen(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listener.fileno(), self._wake)

    def _unlisten(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop.remove_reader(self._listener.fileno())

    def _wake(self) -> None:
        if self._is_ahead(len(self._handing_over)):
            # Without taking the reader off, the socket would go on waking us until somebody takes the connection.
            self._loop.remove_reader(self._listener.fileno())
            self._timer = self._loop.call_later(YIELD_S, self._take_what_is_left)
        else:
            self._accept()

    def _take_what_is_left(self) -> None:
        self._listen()
        beyond = min(max(0, self._in_vain - PATIENCE), DOUBLINGS)
        for _ in range(2**beyond):
            if not self._accept():
                self._in_vain = 0
                return
        self._in_vain += 1

    def _accept(self) -> bool:
        """Takes one connection; False when there is none, or no room for it."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except ConnectionAbortedError:  # its client left while it waited; the next one may be there
            return True
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            logger.error("cannot accept a connection: %s", error.strerror)
            if not self._stopped:
                self._unlisten()
                self._timer = self._loop.call_later(NO_ROOM_S, self._listen)
            return False
        connection.setblocking(False)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._protocol, connection))
        self._handing_over.add(task)
        task.add_done_callback(self._handed_over)
        return True

    def _handed_over(self, task: asyncio.Task[object]) -> None:
        self._handing_over.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a connection could not be taken over: %r", error)


class Evenness:
    """Whether this frontend is ahead of the others, by the open connections in the shared totals."""

    def __init__(self, segment: Segment, reader: CountersReader, index: int) -> None:
        self._totals = segment.array("totals")
        self._reader = reader
        self._index = index

    def is_ahead(self, uncounted: int) -> bool:
        others = [self._open(row) for row, _ in self._reader.live() if row != self._index]
        if not others:
            return False
        own = self._open(self._index) + uncounted
        return own > min(others) + MARGIN + own // 8

    def _open(self, row: int) -> int:
        totals = self._totals[row]
        return int(totals[TotalColumn.CONNECTIONS_OPENED] - totals[TotalColumn.CONNECTIONS_CLOSED])
