"""The client's end of a connection, and the short way for nearly all that comes on it.

    transport --+--> Client --+-- one whole request, its head known, and nothing else under way --> LeanCycle
                              +-- all else --> Connection --> uvicorn's parser, queue, refusals

A request that goes the short way touches nothing of the `Connection`, which inherits from uvicorn's protocol and so
cannot be compiled: it is begun, answered and counted here. If anything happens meanwhile (more bytes, a stop, the
client's leaving), the `Connection` takes the request over as if it had read it itself, and all its rules hold.

Bought: a tenth of what a small request costs a frontend (docs/performance.md, section 6).
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from uvicorn.server import ServerState

from frontend.idle import Silence
from frontend.lean import Lean, LeanCycle
from frontend.outbox import Outbox, Outlet


class Rest(Protocol):
    """The `Connection`, as its client's end sees it: everything but the short way."""

    @property
    def is_at_rest(self) -> bool:
        """No request is under way or half read, and none is refused."""

    def adopt(self, cycle: LeanCycle) -> None:
        """A request that was begun here is under way; from now on its end is told to `on_response_complete`."""

    def on_response_complete(self) -> None: ...

    # What the transport calls:
    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...


class Client:
    """Owned by its transport, whose protocol it is. What a lean request says to its client, it says here."""

    def __init__(
        self,
        connection: Rest,
        transport: asyncio.Transport,
        peer: str,
        lean: Lean,
        state: ServerState,
        silence: Silence,
        outbox: Outbox,
    ) -> None:
        """`peer`: the client's address."""
        self.peer = peer
        self.outlet = Outlet(transport, outbox)
        """Where an answer is written: an event touches nothing else of the connection."""
        self.writes_are_paused = False
        self.is_free = True
        """The connection is at rest, and what comes may go the short way."""
        self.has_served = False
        self._connection = connection
        self._transport = transport
        self._outbox = outbox
        self._is_closing = transport.is_closing
        self._lean = lean
        self._state = state
        self._silence = silence
        self._cycle: LeanCycle | None = None  # the request that went the short way, until it is answered or adopted
        self._steps_aside = False

    def close(self) -> None:
        """After what was sent."""
        self._outbox.flush()
        self._transport.close()

    def abort(self) -> None:
        """At once, so that it cannot pass for an orderly end."""
        self._outbox.flush()
        self._transport.abort()

    def step_aside(self) -> None:
        """Takes the short way no more: from now on everything is the connection's."""
        self._hand_over()
        self._steps_aside = True

    # -- the transport's callbacks -----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.is_free and not self._steps_aside and self._takes(data):
            return
        self._hand_over()
        self._connection.data_received(data)
        self.is_free = self._connection.is_at_rest

    def eof_received(self) -> None:
        self.step_aside()
        self._connection.eof_received()

    def pause_writing(self) -> None:
        self.writes_are_paused = True
        if self._cycle is not None:
            self._cycle.pause()
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self.writes_are_paused = False
        if self._cycle is not None:
            self._cycle.resume()
        self._connection.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.outlet.close()
        self.step_aside()
        self._connection.connection_lost(exc)

    # -- the short way -----------------------------------------------------------------------------------------

    def _takes(self, data: bytes) -> bool:
        """Begins the request, if that is all that there is to do."""
        lean = self._lean
        known = lean.known.whole(data)
        if known is None or self._is_closing():
            return False
        head, body = known
        if len(body) > lean.inference.limit:
            return False
        self.is_free = False
        self.has_served = True
        self._silence.end()
        self._cycle = cycle = lean.cycle(self, head, keep_alive=head.keep_alive)
        cycle.more_body = False
        cycle.begin_with(body)
        return True

    def on_response_complete(self) -> None:
        """The running lean request has been answered."""
        cycle = self._cycle
        if cycle is None:
            self._connection.on_response_complete()
            return
        self._cycle = None
        self._state.total_requests += 1
        if cycle.keep_alive:  # else the transport is closing
            self.is_free = True
            self._silence.begin()

    def _hand_over(self) -> None:
        self.is_free = False
        cycle, self._cycle = self._cycle, None
        if cycle is not None:
            self._connection.adopt(cycle)
