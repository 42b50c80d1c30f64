"""uvicorn, with our way of accepting and of stopping.

uvicorn stays the HTTP server: its parser, its flow control, its graceful stop and its accounting of connections and
tasks. What differs: connections come from the `Acceptor`, each is counted in shared memory, signals are the process's,
and a connection that was taken when the stop began is still served. What happens on one is `connection.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator

import uvicorn

from broker.counters import FrontendCounters
from frontend.accept import Acceptor
from frontend.answer import PAUSE_AT
from frontend.api import Inference
from frontend.connection import Connection
from frontend.idle import IdleConnections
from frontend.lean import Lean
from frontend.outbox import Outbox

KEEP_ALIVE_S = 75
"""Longer than the pools of common clients keep an idle connection, so that the client is the one who closes it."""

_CUT_OFF = "ASGI callable returned without completing response."
"""How uvicorn names, as an error of ours, what is an answer's only way to be cut off visibly. The request's own log
line says it already."""


def quiet_uvicorn() -> None:
    """Leaves warnings and real errors; that it starts and stops is said by the supervisor for every process."""
    uvicorn_logger = logging.getLogger("uvicorn.error")
    uvicorn_logger.setLevel(logging.WARNING)
    uvicorn_logger.addFilter(lambda record: record.msg != _CUT_OFF)


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
        lean: Inference | None = None,
        bound: int = PAUSE_AT,
        outbox: Outbox | None = None,
    ) -> None:
        """`lean`: the inference routes that go the lean way; without it, the application has them all. `bound`: what
        one slow client may hold, in bytes. `outbox`: the process's."""
        super().__init__(config)
        self._lean = Lean(lean, self.server_state) if lean is not None else None
        self._bound = bound
        self._outbox = outbox
        self._counters = counters
        self._listener = listener
        self._is_ahead = is_ahead
        self._on_ready = on_ready
        self._on_stop = on_stop
        self._acceptor: Acceptor | None = None
        self._idle: IdleConnections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        self._idle = IdleConnections(loop, self.config.timeout_keep_alive)
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
        return Connection(
            self.config,
            self.server_state,
            self.lifespan.state,
            self._counters,
            self._idle,
            self._lean,
            self._bound,
            self._outbox,
        )
