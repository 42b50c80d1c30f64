"""uvicorn, with our way of accepting and of stopping.

uvicorn stays the HTTP server: its parser, its flow control, its graceful stop and its accounting of connections and
tasks. What differs: connections come from the `Acceptor`, each is counted in shared memory, signals are the process's,
and a connection that was taken when the stop began is still served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from broker.counters import FrontendCounters, TotalColumn
from frontend.accept import Acceptor

KEEP_ALIVE_S = 75
"""Longer than the pools of common clients keep an idle connection, so that the client is the one who closes it."""
FIRST_REQUEST_S = 1.0
"""How long a connection without a request yet is waited for when stopping."""


_CUT_OFF = "ASGI callable returned without completing response."
"""How uvicorn names, as an error of ours, what is an answer's only way to be cut off visibly. The request's own log
line says it already."""


def quiet_uvicorn() -> None:
    """Leaves warnings and real errors; that it starts and stops is said by the supervisor for every process."""
    uvicorn_logger = logging.getLogger("uvicorn.error")
    uvicorn_logger.setLevel(logging.WARNING)
    uvicorn_logger.addFilter(lambda record: record.msg != _CUT_OFF)


class Connection(HttpToolsProtocol):
    """A client's connection."""

    def __init__(
        self, config: uvicorn.Config, state: ServerState, app_state: dict[str, Any], counters: FrontendCounters
    ) -> None:
        super().__init__(config=config, server_state=state, app_state=app_state)
        self._counters = counters
        self._requested = False
        self._stopping = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", transport))  # uvloop's are no subclass
        self._counters.count(TotalColumn.CONNECTIONS_OPENED)

    def connection_lost(self, exc: Exception | None) -> None:
        self._counters.count(TotalColumn.CONNECTIONS_CLOSED)
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._requested = True
        if self._stopping:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        # uvicorn would close this one at once. Without the wait: (1) the client connects, (2) it sends its request,
        # (3) we take the connection from the backlog and stop, (4) the request is never read, although no port was
        # closed when it was made.
        if self._requested or self._stopping:
            super().shutdown()
        else:
            self._stopping = True
            self.loop.call_later(FIRST_REQUEST_S, super().shutdown)


class Server(uvicorn.Server):
    """Serves until `should_exit` is set, then stops gracefully; `serve` returns when that is done."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        counters: FrontendCounters,
        is_ahead: Callable[[int], bool],
        on_ready: Callable[[], None],
        on_stop: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._counters = counters
        self._listener = listener
        self._is_ahead = is_ahead
        self._on_ready = on_ready
        self._on_stop = on_stop
        self._acceptor: Acceptor | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        self._acceptor = Acceptor(self._listener, self._connection, self._is_ahead, loop)
        self._acceptor.start()
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()
        if self._acceptor is not None:
            self._acceptor.stop()
            await self._acceptor.settled()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's business; uvicorn would also raise them again after the stop."""
        yield

    def _connection(self) -> asyncio.Protocol:
        return Connection(self.config, self.server_state, self.lifespan.state, self._counters)
