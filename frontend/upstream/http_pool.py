"""The connections to one HTTP engine: who gets which, how many there may be, how long they are kept.

    call ---acquire---> idle connection (last used first) | new one, if below the limit | a place in the queue
                                                                                            |
         <--- spare, or a place freed by `gone` <--------------------------------------------+

Waiting for a connection and connecting are bounded together by the connect timeout, and the queue by the limit
of connections: a call that cannot be served soon is better served by another instance.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from typing import cast
from urllib.parse import urlsplit

from broker.errors import ConnectFailed, EngineSaturated, PenstockError
from frontend.known_heads import KnownHeads
from frontend.outbox import Outbox
from frontend.upstream.base import AnswerHead
from frontend.upstream.http_connection import Connection, Exchange, Owner
from frontend.upstream.http_intake import HttpIntake

IDLE_S = 30.0
"""A connection that nobody has needed for this long is closed, at the latest when twice as much has passed."""


_PORTS = {"http": 80, "https": 443}


@functools.cache
def trusted() -> ssl.SSLContext:
    """What certificates of engines are checked against: the system's authorities, or those of `SSL_CERT_FILE`."""
    return ssl.create_default_context()


class Waiter(Exchange):
    """A call that wants a connection."""

    def connecting(self, connection: Connection) -> None:
        """It will be served by this connection, which is free or being opened."""
        raise NotImplementedError


class Address:
    """Where an instance's URL points. Raises `ConnectFailed` for what this transport cannot speak."""

    __slots__ = ("authority", "host", "is_encrypted", "port")

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as e:
            raise ConnectFailed(f"the URL {url!r} is malformed: {e}") from e
        if parts.scheme not in _PORTS:
            raise ConnectFailed(f"the URL {url!r} cannot be used: HTTP engines are reached by http:// or https://")
        if not parts.hostname or parts.username or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ConnectFailed(f"the URL {url!r} cannot be used: http://host:port is expected")
        self.host = parts.hostname
        self.port = _PORTS[parts.scheme] if port is None else port
        self.is_encrypted = parts.scheme == "https"
        shown = f"[{self.host}]" if ":" in self.host else self.host
        if not shown.isascii():
            raise ConnectFailed(f"the URL {url!r} cannot be used: its host must be written in ASCII")
        self.authority = f"{shown}:{self.port}".encode()
        """For the Host header."""


class Pool(Owner):
    """Owns every connection to one engine. Used on the loop's thread alone."""

    def __init__(
        self,
        url: str,
        limit: int,
        loop: asyncio.AbstractEventLoop,
        idle_s: float = IDLE_S,
        known: KnownHeads[AnswerHead] | None = None,
        outbox: Outbox | None = None,
        intake: HttpIntake | None = None,
        *,
        revives: bool = True,
    ) -> None:
        """`limit`: connections open or being opened at once. `revives`: a call that a kept connection lost is sent once
        more. Raises `ConnectFailed` for a URL it cannot use."""
        super().__init__(
            KnownHeads() if known is None else known,
            Outbox(loop) if outbox is None else outbox,
            HttpIntake(loop) if intake is None else intake,
        )
        self.url = url
        self.revives = revives
        self.address = Address(url)
        self._limit = limit
        self._loop = loop
        self._idle_s = idle_s
        self._connections: set[Connection] = set()
        self._idle: list[Connection] = []
        """The last one is the one used last. Those that are gone are found out when they are taken."""
        self._unneeded = 0
        """So many of them, the first ones, have lain there since the reaper looked last."""
        self._waiting: dict[Waiter, None] = {}
        """In order of arrival; a dict, because leaving out of turn must not cost a search."""
        self._reaper: asyncio.TimerHandle | None = None
        self._retired = False

    def __repr__(self) -> str:
        busy = sum([connection.exchange is not None for connection in self._connections])
        return f"<Pool {self.url} busy={busy} idle={len(self._connections) - busy} waiting={len(self._waiting)}>"

    @property
    def is_empty(self) -> bool:
        return not self._connections and not self._waiting

    def idle(self) -> Connection | None:
        """The connection used last among those that are free and still open."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            if len(idle) < self._unneeded:
                self._unneeded = len(idle)
            if connection.is_usable:
                return connection
        return None

    def enter(self, waiter: Waiter) -> None:
        """Opens a connection for a call, or queues it. Raises `EngineSaturated` when the queue is full, too."""
        if len(self._connections) < self._limit:
            self._open(waiter)
        elif len(self._waiting) < self._limit:
            self._waiting[waiter] = None
        else:
            raise EngineSaturated(f"all {self._limit} connections to {self.url} are busy, and as many requests wait")

    def leave(self, waiter: Waiter) -> None:
        """The call no longer waits; harmless if it did not."""
        self._waiting.pop(waiter, None)

    def discard(self, connection: Connection) -> None:
        """Aborts a connection, in whatever state."""
        connection.abort()
        if not connection.is_dialled:
            self.gone(connection)

    def retire(self) -> None:
        """The instance is gone: idle connections are closed now, busy ones when their answers have ended."""
        self._retired = True
        self._abort(self._idle)
        self._idle, self._unneeded = [], 0

    def close(self, error: PenstockError) -> None:
        """Ends everything; calls under way or waiting hear the error."""
        self.retire()
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        waiting = list(self._waiting)
        self._waiting.clear()
        exchanges = [c.exchange for c in self._connections if c.exchange is not None]
        for connection in list(self._connections):
            self.discard(connection)
        for exchange in [*exchanges, *waiting]:
            exchange.fail(error)

    # -- what connections report ---------------------------------------------------------------------------

    def spare(self, connection: Connection) -> None:
        if self._waiting:
            waiter = next(iter(self._waiting))
            del self._waiting[waiter]
            waiter.connecting(connection)
            connection.send(waiter)
        elif self._retired:
            connection.abort()
        else:
            self._idle.append(connection)
            if self._reaper is None:
                self._reaper = self._loop.call_later(self._idle_s, self._reap)

    def gone(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if self._waiting and len(self._connections) < self._limit:
            waiter = next(iter(self._waiting))
            del self._waiting[waiter]
            self._open(waiter)

    # -- opening and reaping -------------------------------------------------------------------------------

    def _open(self, waiter: Waiter) -> None:
        connection = Connection(self, waiter, self._loop)
        self._connections.add(connection)
        waiter.connecting(connection)
        connection.dial = self._loop.create_task(self._dial(connection))

    async def _dial(self, connection: Connection) -> None:
        """The one task there is, once per new connection; the request is sent by `connection_made` already."""
        try:
            address, tls = self.address, trusted() if self.address.is_encrypted else None
            protocol = cast("asyncio.Protocol", connection)
            await self._loop.create_connection(lambda: protocol, address.host, address.port, ssl=tls)
        except (OSError, UnicodeError, ValueError) as e:  # refused, unreachable, unknown or impossible name
            exchange = connection.exchange
            connection.exchange = None
            self.gone(connection)
            if exchange is not None:
                error = ConnectFailed(f"cannot connect to {self.url}: {e}")
                error.__cause__ = e
                exchange.fail(error)

    def _reap(self) -> None:
        unneeded, self._idle = self._idle[: self._unneeded], self._idle[self._unneeded :]
        self._unneeded = len(self._idle)
        self._reaper = self._loop.call_later(self._idle_s, self._reap) if self._idle else None
        self._abort(unneeded)

    def _abort(self, idle: list[Connection]) -> None:
        for connection in idle:
            if connection.is_usable:
                connection.abort()
