"""One keep-alive connection to an HTTP engine, carrying one request after another.

              dial                    send                 complete and reusable
    (nothing) ----> connecting ----> busy <-------------------------------------> idle
                        |             | broken, cancelled, not reusable             | closed, too old
                        +-------------+---------------------> gone <----------------+

The pool decides who gets it, the call says what is asked and who hears the answer; here are only bytes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from broker.errors import UpstreamBroken
from broker.keepalive import keep_alive
from frontend.known_heads import KnownHeads
from frontend.outbox import Outbox, Outlet
from frontend.sending import NONE, descriptor
from frontend.upstream.base import AnswerHead, Sink
from frontend.upstream.http_chunk import chunk_size
from frontend.upstream.http_intake import HttpIntake
from frontend.upstream.http_response import ResponseReader

if TYPE_CHECKING:
    from frontend._conduit import Conduit

JOIN_BYTES = 64 * 1024
"""Head and body go out in one write up to this size; above, copying costs more than a second system call."""


class Exchange(Sink):
    """The call a connection serves, the sink of its answer; it is neither after `finish`, `fail` or `went_stale`."""

    def __init__(self) -> None:
        self.head = b""
        self.body = b""
        self.head_only = False
        self.paused = False
        self.whole: Sink | None = None
        """Who takes whole chunks in its place, if anybody does; then it has `answer`."""

    def went_stale(self) -> None:
        """The engine had closed the kept connection before it could answer; nothing of an answer was heard."""
        raise NotImplementedError


class Owner:
    """What a connection knows of its pool."""

    def __init__(self, known: KnownHeads[AnswerHead], outbox: Outbox, intake: HttpIntake) -> None:
        self.known = known
        """Those of engines of one kind are alike."""
        self.outbox = outbox
        self.intake = intake

    def spare(self, connection: Connection) -> None:
        """It is idle and may be used again."""
        raise NotImplementedError

    def gone(self, connection: Connection) -> None:
        """It is closed, and nothing of an answer is held in it. Told once; not when the dial did not succeed."""
        raise NotImplementedError


class Connection:
    """Owned by its pool from the dial to `gone`; busy while `exchange` is set. An `asyncio.Protocol` by its methods."""

    __slots__ = (
        "_answered",
        "_closed",
        "_conduit",
        "_loop",
        "_outlet",
        "_owner",
        "_reader",
        "_socket",
        "_started",
        "_stream",
        "_transport",
        "_used",
        "dial",
        "exchange",
    )

    def __init__(self, owner: Owner, exchange: Exchange | None, loop: asyncio.AbstractEventLoop) -> None:
        self.exchange = exchange
        self.dial: asyncio.Task[None] | None = None
        """The task that connects; held here so that it lives, and can be cancelled."""
        self._owner = owner
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._outlet: Outlet | None = None
        self._reader = ResponseReader()
        self._stream: Sink | None = None
        """Gets whole chunks as they come, past the reader, which stands between two; None: all goes through it."""
        self._conduit: Conduit | None = None
        """By which the answer goes at present, past us."""
        self._socket = NONE
        self._started = False
        self._answered = False
        self._used = False
        self._closed = False

    def __repr__(self) -> str:
        if self._transport is None:
            state = "connecting" if self.exchange else "cancelled"
        elif self._transport.is_closing():
            state = "closing"
        else:
            state = "busy" if self.exchange else "idle"
        return f"<Connection {state}>"

    @property
    def is_dialled(self) -> bool:
        return self._transport is not None

    @property
    def is_usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, exchange: Exchange) -> None:
        """Puts a request on the wire; the connection must be new or idle. Calls nothing back before it returns."""
        outlet, transport = self._outlet, self._transport
        assert outlet is not None
        assert transport is not None
        self.exchange = exchange
        self._started = False
        if self._answered or exchange.head_only:  # else the reader is as it was made: it has read nothing
            self._answered = False
            self._reader.begin(head_only=exchange.head_only)
        head, body = exchange.head, exchange.body
        if len(body) <= JOIN_BYTES:
            outlet.write(head + body)
        else:
            outlet.write(head)
            outlet.write(body)
        if exchange.paused:
            transport.pause_reading()

    def pause(self) -> None:
        self._leave()
        self._stream = None
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Reads on. What was held back comes in a later turn of the loop, not from within this call."""
        if self._transport is not None:
            self._transport.resume_reading()
            self._loop.call_soon(self._deliver)

    def abort(self) -> None:
        """Gives the connection up at once, unsent and unread bytes included; nobody hears of it but the pool."""
        self._leave()
        self.exchange = self._stream = None
        if self._closed:
            self._gone()
        elif self._transport is not None:
            self._transport.abort()
        elif self.dial is not None:
            self.dial.cancel()

    # -- asyncio's callbacks -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio and uvloop set TCP_NODELAY on every TCP connection; tests/frontend/upstream holds them to it.
        transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass
        self._transport = transport
        self._outlet = Outlet(transport, self._owner.outbox)
        self._socket = descriptor(transport)
        # A host that lost its power sends no reset; an unstreamed answer has no other limit to its silence.
        keep_alive(transport.get_extra_info("socket"))
        if self.exchange is None:  # cancelled while the handshake was under way
            transport.abort()
        else:
            self.send(self.exchange)

    def data_received(self, data: bytes) -> None:
        stream = self._stream
        if stream is not None:
            size = chunk_size(data)
            if size:
                stream.chunk(data, size)
                if self._socket != NONE and self._stream is stream:
                    self._lend(stream)
                return
            self._stream = None
        exchange = self.exchange
        if exchange is None:  # an idle engine has nothing to say: whatever this is, it answers no request
            self.abort()
            return
        reader = self._reader
        if self._answered:
            reader.feed(data)
        elif exchange.whole is not None and not exchange.paused and self._is_known(exchange, data):
            return
        else:
            self._answered = True
            reader.feed(data)
            if reader.reusable and reader.status == 200 and reader.has_body and not exchange.head_only:
                self._learn(data)
        self._deliver()

    def _learn(self, data: bytes) -> None:
        """Unless it repeats the name of its request, the head of this answer will come again."""
        headers = self._reader.headers
        if all(name != b"x-request-id" for name, _ in headers):
            self._owner.known.learn(data, self._reader.lines, AnswerHead(headers))

    def _is_known(self, exchange: Exchange, data: bytes) -> bool:
        """Passes a whole answer with a known head on, past the reader, which goes on waiting for one."""
        known = self._owner.known.whole(data)
        transport = self._transport
        assert transport is not None
        # An early answer (while the body is still being sent) is the reader's business, and so is one without a body.
        if known is None:
            return False
        head, body = known
        if not body or self._is_unsent(transport) or transport.is_closing():
            return False
        self.exchange = None
        self._used = True
        self._owner.spare(self)
        exchange.answer(head, body)
        return True

    def pause_writing(self) -> None:
        """The rest of a request waits in the transport; there is no more of it than was read from the client."""

    def resume_writing(self) -> None: ...

    def eof_received(self) -> None:
        if self.exchange is not None and self._answered:
            self._reader.end()
            self._deliver()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self._closed = True
        exchange = self.exchange
        if exchange is None:
            self._gone()
        elif self._used and not self._answered:
            self.abort()
            exchange.went_stale()
        else:
            reader = self._reader
            if not reader.complete and reader.error is None:
                reader.error = UpstreamBroken(f"the connection to the engine broke: {exc or 'closed by the engine'}")
            self._deliver()  # a paused client hears of it after the bytes held for it; until then we are not gone

    def _gone(self) -> None:
        self._reader.close()
        self._owner.gone(self)

    # -- the answer on its way to the client ---------------------------------------------------------------

    def _deliver(self) -> None:
        """Passes on what has been read, unless the client is paused. The sink may cancel or pause at each call."""
        exchange = self.exchange
        if exchange is None:
            return
        reader = self._reader
        if reader.status and not self._started:
            if exchange.paused:
                return
            self._started = True
            exchange.start(reader.status, reader.headers)
            if self.exchange is not exchange:
                return
        if reader.has_body:
            if exchange.paused:
                return
            exchange.write(reader.take())
            if self.exchange is not exchange:
                return
        if reader.complete:
            self._release(exchange)
            exchange.finish()
        elif reader.error is not None:
            self.abort()
            exchange.fail(reader.error)
        elif reader.is_between and not exchange.paused:
            self._stream = exchange.whole

    # -- the short way (frontend/conduit.py) ---------------------------------------------------------------

    def _lend(self, stream: Sink) -> None:
        """The answer flows: from here on it need not come to us."""
        conduit, transport = stream.conduit(), self._transport
        assert transport is not None
        if conduit is None or self._stream is not stream or transport.is_closing():
            return
        if self._owner.intake.join(conduit, self._socket, self):
            self._conduit = conduit
            transport.pause_reading()

    def _leave(self) -> None:
        """The transport is still paused."""
        conduit, self._conduit = self._conduit, None
        if conduit is not None:
            self._owner.intake.leave(conduit)

    def parted(self, read: bytes, unsent: bytes) -> None:
        """The intake's word that the conduit has left: for what was `read`, for what the client did not take, or for
        what only the transport can find out about the socket."""
        exchange, transport = self.exchange, self._transport
        self._conduit = None
        if exchange is None or transport is None:
            return
        if unsent and exchange.whole is not None:
            exchange.whole.unsent(unsent)
        if not exchange.paused and not transport.is_closing():
            transport.resume_reading()
        if read:
            self.data_received(read)

    def break_off(self) -> None:
        """As if the engine had: `connection_lost` follows."""
        if self._transport is not None:
            self._transport.abort()

    def _is_unsent(self, transport: asyncio.Transport) -> bool:
        """Of the request something is still to be written."""
        outlet = self._outlet
        assert outlet is not None
        return outlet.held > 0 or transport.get_write_buffer_size() > 0

    def _release(self, exchange: Exchange) -> None:
        """The response is whole: the connection is spare if both sides agree where it ended, else closed."""
        transport = self._transport
        assert transport is not None
        self.exchange = None
        # An early answer (413, say) may come while the body is still being sent: the rest of it would follow.
        if self._reader.reusable and not transport.is_closing() and not self._is_unsent(transport):
            self._used = True
            if exchange.paused:
                transport.resume_reading()
            self._owner.spare(self)
        else:
            self.abort()
