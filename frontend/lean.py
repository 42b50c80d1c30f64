"""The lean path: an inference request on a client's connection, without ASGI, task, future or event.

                      begin                     start                 finish, fail
    reading the body --------> at an instance --------> its answer --------------> complete
           |                        |  fail                  |                         ^
           +--- refused ------------+------------------------|-------------------------+
                                                leave, from anywhere: nobody listens any more

A `LeanCycle` stands where uvicorn has its `RequestResponseCycle`: `connection.py` queues, begins and ends both kinds
alike, and what uvicorn itself looks at (`response_complete`, `keep_alive`) means the same. What a request means is
said by `api.Inference`, its way by `Forward`; here are only the bytes of the answer.

Measured against the same request over ASGI: benchmarks/test_lean.py.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from broker.errors import BadRequest, PenstockError, ReceivingFull
from frontend import headers
from frontend.answer import last_event, whole_error
from frontend.api import Inference, too_large
from frontend.forward import Forward
from frontend.known_heads import KnownHeads
from frontend.outbox import Outlet
from frontend.request_head import RequestHead
from frontend.upstream.base import AnswerHead, Headers, Sink

if TYPE_CHECKING:
    from frontend._conduit import Conduit
    from frontend.client import Client

logger = logging.getLogger("frontend")

_UNTIL_CLOSE: Final = -1
"""Instead of a length: HTTP/1.0 knows no chunks, so the connection's end is the body's."""
_BODILESS: Final = frozenset((204, 304))
_OK: Final = STATUS_LINE[200]
_CRLF: Final = b"\r\n"

_SIZES: Final = tuple([b"%x\r\n" % size for size in range(1024)])
"""Lines of chunks: nearly all events are so small, and to format a size takes longer than all else of a frame."""
_MOST_SIZES: Final = len(_SIZES)

NOT_INFERENCE = b"/v1/abort_requests"
"""The one POST below /v1/ that is not for an instance."""


class Lean:
    """What the lean requests of a frontend share."""

    def __init__(self, inference: Inference, state: ServerState) -> None:
        self.inference = inference
        self._state = state
        self._defaults: Headers = []
        self._lines = b""
        self._takes_any = inference.face.paths is None
        self.names = inference.face.names_requests
        self.known: KnownHeads[RequestHead] = KnownHeads()

    def takes(self, method: bytes, url: bytes) -> bool:
        """Whether a request may go the lean way: any `POST /v1/…` but one. What is not beyond doubt (an escaped path, a
        fragment) goes to starlette, which reads it alike."""
        if method != b"POST" or not url.startswith(b"/v1/") or b"%" in url or b"#" in url:
            return False
        if url.startswith(NOT_INFERENCE):
            return False
        return self._takes_any or self.inference.serves(url.partition(b"?")[0].decode("latin-1"))

    def cycle(self, client: Client, request: RequestHead, *, keep_alive: bool) -> LeanCycle:
        return LeanCycle(client, self, request, request.ident or headers.new_id(), client.outlet, keep_alive)

    def default_lines(self) -> bytes:
        """The headers that the server adds to every answer, as they are written. uvicorn makes them once a second."""
        if self._state.default_headers is not self._defaults:
            self._defaults = self._state.default_headers
            self._lines = b"".join([b"%b: %b\r\n" % pair for pair in self._defaults])
        return self._lines

    def answer_lines(self, head: AnswerHead) -> tuple[bytes, bytes]:
        """Of a whole answer, as the client gets them: up to the body's length, and behind it."""
        found = headers.returned(head.headers, names=self.names)
        at = next(i for i, (name, _) in enumerate(found) if name == b"content-length")
        before, after = (b"".join([b"%b: %b\r\n" % pair for pair in part]) for part in (found[:at], found[at + 1 :]))
        head.lines = before + b"content-length: ", after
        return head.lines


class LeanCycle(Sink):
    """One request and its answer: the client's sink. Owned by its connection; owns its `Forward`."""

    def __init__(
        self,
        client: Client,
        lean: Lean,
        request: RequestHead,
        ident: bytes,
        outlet: Outlet,
        keep_alive: bool,
    ) -> None:
        self._client = client
        self._lean = lean
        self._request = request
        self._ident = ident
        self._outlet = outlet
        self.keep_alive = keep_alive
        self.more_body = True
        self.response_complete = False
        self._parts: list[bytes] = []
        self._size = 0
        self._counted = 0  # bytes among them that count as being received
        self._error: BadRequest | None = None  # why the body is not read on
        self._forward: Forward | None = None
        self._started = False
        self._head = b""  # held until the first bytes of the body, so that both go out in one write
        self._chunked = False
        self._events = False
        self._left = 0  # bytes of the body that the answer's length announces
        self._last = b""  # the last chunk, in its frame
        self._conduit: Conduit | None = None  # whose last chunk is a later one

    def __repr__(self) -> str:
        state = "complete" if self.response_complete else "reading" if self.more_body else "open"
        return f"<LeanCycle {self._ident.decode()} {state}>"

    # -- the connection's side ---------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """`begin` may be called: the body is whole, or need not become so."""
        return not self.more_body or self._error is not None

    @property
    def held_bytes(self) -> int:
        """Of the body, until the request has begun."""
        return self._size

    def refuse(self, error: BadRequest) -> None:
        """Whatever its body: it will hear of this when its turn comes."""
        self._error = error

    def feed(self, body: bytes) -> None:
        """A part of the request's body."""
        if self._error is not None:
            return
        self._size += len(body)
        if self._size > self._lean.inference.limit:
            self._error = too_large(self._lean.inference.limit)
            self._parts.clear()
        else:
            self._parts.append(body)

    def goes_on(self) -> None:
        """A read has ended in the middle of the body: only now what has come of it counts."""
        if self._error is None:
            try:
                self._lean.inference.receiving.take(self._size - self._counted)
                self._counted = self._size
            except ReceivingFull as error:
                self._error = error
                self._parts.clear()
                self._uncount()

    def begin(self) -> None:
        """Sends the request on its way. To be called once, when it is this one's turn and it is ready."""
        parts = self._parts
        self._parts, self._size = [], 0  # an open stream does not keep its prompt
        if self._counted:
            self._uncount()
        if self._error is not None:
            self._refused(self._error)
        else:
            self.begin_with(b"".join(parts))

    def begin_with(self, body: bytes) -> None:
        """As `begin`, with the whole body, which was never fed."""
        client, inference = self._client, self._lean.inference
        try:
            self._forward = forward = inference.forward(self._request, body, self._ident, self, client.peer)
            if client.writes_are_paused:
                forward.pause()
            forward.begin()
        except BadRequest as error:
            self._refused(error)
        except Exception:  # the outermost net, as starlette has it for its routes
            logger.exception("a request failed")
            self.leave()
            self._answer_with(PenstockError("internal error"))

    def leave(self) -> None:
        """Nobody listens any more. Idempotent."""
        self._uncount()
        forward, self._forward = self._forward, None
        if forward is not None:
            forward.cancel()

    def pause(self) -> None:
        """The client does not keep up."""
        if self._forward is not None:
            self._forward.pause()

    def resume(self) -> None:
        if self._forward is not None:
            self._forward.resume()

    # -- the sink ----------------------------------------------------------------------------------------------

    def start(self, status: int, found: Headers) -> None:
        self._frame(status, headers.for_client(found, self._lean.inference.shown(self._ident)))
        self._events = (self._chunked or self._left == _UNTIL_CLOSE) and headers.take_events(found)

    def write(self, data: bytes) -> None:
        if self._chunked and not self._head:
            self._conduit = None
            self._last = framed = _framed(data)
            self._outlet.write(framed)
        else:
            self._write_body(data)

    def _write_body(self, data: bytes) -> None:
        """Sends the first bytes of the body with the head, or any of a body that is not chunked."""
        head, self._head = self._head, b""
        self._started = True
        if self._chunked:
            self._last = data = _framed(data)
        elif self._left >= 0:
            self._left -= len(data)
            if self._left < 0:
                self._cut_off()
                return
        self._outlet.write(head + data)

    def answer(self, head: AnswerHead, data: bytes) -> None:
        lean = self._lean
        before, after = head.lines or lean.answer_lines(head)
        if lean.names:
            after = b"%bx-request-id: %b\r\n" % (after, self._ident)
        end = b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n"
        self._outlet.write(b"%b%b%b%d\r\n%b%b%b" % (_OK, lean.default_lines(), before, len(data), after, end, data))
        self._complete()

    def chunk(self, framed: bytes, size: int) -> None:
        if self._chunked and not self._head:
            self._conduit = None
            self._last = framed
            self._outlet.write(framed)
        else:
            self.write(framed[-size - 2 : -2])

    def conduit(self) -> Conduit | None:
        if not self._chunked or self._head or self.response_complete:
            return None
        self._forget_conduit()
        self._conduit = self._outlet.conduit()
        return self._conduit

    def unsent(self, data: bytes) -> None:
        self._outlet.rest(data)

    def finish(self) -> None:
        if self._chunked:
            self._send(self._head + b"0\r\n\r\n")
        elif self._left > 0:
            self._cut_off()
            return
        elif self._head:
            self._send(self._head)
        self._complete()

    def fail(self, error: PenstockError) -> None:
        if not self._started:
            self._answer_with(error)
        elif self._events:
            self._forget_conduit()
            self.write(last_event(error, self._last[:-2], self._lean.inference.face))
            self.finish()
        else:
            self._cut_off()

    # -- within ------------------------------------------------------------------------------------------------

    def _frame(self, status: int, found: Headers) -> None:
        """Makes the head, and decides how the body's end will be seen."""
        lines = [STATUS_LINE[status], self._lean.default_lines()]
        length = None
        for name, value in found:
            lines += (name, b": ", value, b"\r\n")
            if name == b"content-length":
                length = int(value)
        if length is not None or status in _BODILESS:
            self._left = 0 if status in _BODILESS else length or 0
        elif self._request.modern:
            self._chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
        else:
            self._left = _UNTIL_CLOSE
            self.keep_alive = False
        lines.append(b"\r\n" if self.keep_alive else b"connection: close\r\n\r\n")
        self._head = b"".join(lines)

    def _forget_conduit(self) -> None:
        conduit, self._conduit = self._conduit, None
        if conduit is not None and conduit.size:
            self._last = conduit.ending + _CRLF

    def _uncount(self) -> None:
        self._lean.inference.receiving.give_back(self._counted)
        self._counted = 0

    def _refused(self, error: BadRequest) -> None:
        self._lean.inference.refuse(self._request.path, self._ident, error, self._client.peer)
        self._answer_with(error)

    def _answer_with(self, error: PenstockError) -> None:
        inference = self._lean.inference
        status, data, found = whole_error(error, inference.shown(self._ident), inference.face)
        self._chunked = self._events = False
        self._frame(status, found)
        self.write(data)
        self._complete()

    def _send(self, data: bytes) -> None:
        self._started = True
        self._head = b""
        self._outlet.write(data)

    def _cut_off(self) -> None:
        """Ends the connection so that the client sees that something is missing."""
        self.keep_alive = False
        self.leave()
        if self._left == _UNTIL_CLOSE:
            self._client.abort()
        self._complete()

    def _complete(self) -> None:
        self._forward = None
        self.response_complete = True
        if not self.keep_alive:
            self._client.close()
        self._client.on_response_complete()


def _framed(data: bytes) -> bytes:
    """As a chunk of HTTP's chunked coding."""
    size = len(data)
    return (_SIZES[size] if size < _MOST_SIZES else b"%x\r\n" % size) + data + b"\r\n"
