"""One request at a native engine: what its deltas mean, in which order, and what the client hears of them.

    hear | take -> deliver()           several deltas of one drained batch become one write
    fail(error)  -> deliver()

Pure but for the sink it calls. The transport owns the socket and decides when to `deliver`; a call that was
paused holds its bytes, up to a bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from broker.errors import ClientTooSlow, PenstockError, UpstreamBroken
from broker.wire import CHUNK, DONE, ERROR
from frontend.upstream.base import AnswerHead, Headers, Sink
from frontend.upstream.zmq_errors import shown

if TYPE_CHECKING:
    from frontend._conduit import Conduit

SSE: Final[Headers] = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON: Final[Headers] = [(b"content-type", b"application/json")]


class Owner(Protocol):
    """What a call needs of its transport."""

    whole: AnswerHead
    """Of every unstreamed answer."""

    def deliver_soon(self, call: ZmqCall) -> None:
        """Calls `deliver` in a later turn of the loop."""

    def abort(self, call: ZmqCall) -> None:
        """The engine need not go on with it."""

    def lend(self, call: ZmqCall, conduit: Conduit) -> None:
        """What the engine says next goes that way, as long as it is the next piece of the answer."""

    def take_back(self, call: ZmqCall) -> None:
        """No longer."""

    def release(self, call: ZmqCall) -> None:
        """It has ended and wants to hear no more."""


class ZmqCall:
    """`Call` for whoever forwards. `_sink` is None once it has heard the end or wants to hear no more."""

    def __init__(self, number: int, sink: Sink, owner: Owner, bound: int, *, stream: bool) -> None:
        """`bound`: bytes it may hold while paused."""
        # What each delta looks at comes first, so that it lies on one or two cache lines: with some hundred streams the
        # others' have pushed them out when the next delta comes, and that costs more than understanding it.
        self.peer: object = None
        """Whose deltas count; None until the request was sent."""
        self._next = 0
        self._first = b""
        """What there is to deliver, or nothing; nearly always it is one part, which takes no list."""
        self._sink: Sink | None = sink
        self._others: list[bytes] | None = None
        """The parts behind it."""
        self._conduit: Conduit | None = None
        """By which the answer goes at present, past us."""
        self._flows = False
        """Its answer has begun, and there is nothing else to say of it: the state of nearly every delta."""
        self._started = False
        self._paused = False
        self._done = False
        self._stream = stream
        self._error: PenstockError | None = None
        self.id = number
        self._owner = owner
        self._bound = bound
        self._held_bytes = 0
        self._status = 200

    def __repr__(self) -> str:
        if self._sink is None:
            state = "ended"
        elif self._done or self._error:
            state = "ending"
        else:
            state = "open"
        return f"<ZmqCall {self.id} {state}{' paused' if self._paused else ''}>"

    # -- whoever forwards ----------------------------------------------------------------------------------

    def cancel(self) -> None:
        if self._sink is not None:
            self._take_back()
            if not self._done and self._error is None:
                self._owner.abort(self)
            self._clear()
            self._end()

    def pause(self) -> None:
        self._take_back()
        self._paused = True
        self._flows = False

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._held_bytes = 0
            if self._sink is not None:
                self._owner.deliver_soon(self)

    # -- the short way (frontend/conduit.py) ----------------------------------------------------------------

    def lend(self) -> None:
        """What was there has been delivered and written: if the answer flows, it need not come to us from here on."""
        if not self._flows or self._first or self._sink is None or self._conduit is not None:
            return
        conduit = self._sink.conduit()
        if conduit is not None:
            conduit.next = self._next
            self._conduit = conduit
            self._owner.lend(self, conduit)

    def unsent(self, data: bytes) -> None:
        """What the conduit could not send."""
        self._take_back()
        if self._sink is not None:
            self._sink.unsent(data)

    def _take_back(self) -> None:
        conduit, self._conduit = self._conduit, None
        if conduit is not None:
            self._next = conduit.next
            self._owner.take_back(self)

    # -- the engine's side ---------------------------------------------------------------------------------

    def hear(self, sequence: int, kind: int, data: bytes) -> bool:
        """`take` of a delta that is well-formed: nearly every one, and nearly always there is nothing to it."""
        if self._conduit is not None:
            self._take_back()
        if self._flows and kind == CHUNK and sequence == self._next and data:
            self._next = sequence + 1
            if self._first:
                self._add(data)
                return False
            self._first = data
            return True
        return self.take([self.id, sequence, kind, data])

    def take(self, delta: list[object]) -> bool:
        """One delta of this call's engine. True if there was nothing to deliver before and is now.

        A delta that is malformed or out of sequence ends the call: something of its answer is missing.
        """
        self._take_back()
        sequence, kind, data = delta[1], delta[2], delta[3]
        quiet = not self._first
        if self._done or self._error is not None or self._sink is None:
            return False
        self._flows = False
        if sequence != self._next:
            self.fail(UpstreamBroken(f"a part of the engine's answer was lost (part {self._next})"), abort=True)
            return True
        if type(data) is not bytes:
            self.fail(UpstreamBroken("the engine sent a malformed part of an answer"), abort=True)
            return True
        self._next += 1
        if kind == CHUNK:
            if not data:
                return False
            self._add(data)
            if self._paused:
                self._hold(len(data))
            return quiet
        if kind == DONE:
            self._done = True
            self._add(data)
        elif kind == ERROR:
            status = delta[4] if len(delta) > 4 else None
            if self._started or self._first:
                self._error = UpstreamBroken(f"the engine ended its answer with an error: {shown(data)}")
            else:  # the engine's own answer, passed on like any other
                self._status = status if type(status) is int and 400 <= status <= 599 else 502
                self._stream = False
                self._done = True
                self._add(data)
        else:
            self.fail(UpstreamBroken("the engine sent an unknown kind of part"), abort=True)
        return True

    def fail(self, error: PenstockError, *, abort: bool = False) -> None:
        """Ends the call; the client hears of it at the next `deliver`, after what it has still to hear."""
        if not self._done and self._error is None and self._sink is not None:
            self._take_back()
            self._flows = False
            self._error = error
            if abort:
                self._owner.abort(self)

    def deliver(self) -> None:
        """Tells the sink what there is. It may cancel or pause at each call."""
        sink, data = self._sink, self._first
        if sink is None:
            return
        if self._flows and data:
            if self._others is not None:
                data = self._whole()
            self._first = b""
            sink.write(data)
            return
        if data or (self._done and not self._started):
            if self._paused:
                return
            at_once = self._done and not self._started and not self._stream
            if at_once and data and self._status == 200 and sink.takes_whole:
                data = self._whole()
                self._end()
                sink.answer(self._owner.whole, data)
                return
            if not self._started:
                self._started = True
                sink.start(self._status, self._headers())
                if self._sink is None or (data and self._paused):
                    return
            if data:
                data = self._whole()
                self._clear()
                sink.write(data)
                if self._sink is None:
                    return
        if self._done:
            self._end()
            sink.finish()
        elif self._error is not None:
            self._end()
            sink.fail(self._error)
        else:
            self._flows = self._started and not self._paused

    def _end(self) -> None:
        self._sink = None
        self._flows = False
        self._owner.release(self)

    def _headers(self) -> Headers:
        if self._stream:
            return list(SSE)
        if not self._done:
            return list(JSON)
        return [*JSON, (b"content-length", b"%d" % len(self._whole()))]

    def _add(self, data: bytes) -> None:
        if not self._first:
            self._first = data
        elif self._others is None:
            self._others = [data]
        else:
            self._others.append(data)

    def _whole(self) -> bytes:
        """What there is to deliver; it stays so."""
        if self._others is not None:
            self._first += b"".join(self._others)
            self._others = None
        return self._first

    def _clear(self) -> None:
        self._first = b""
        self._others = None

    def _hold(self, size: int) -> None:
        self._held_bytes += size
        if self._held_bytes > self._bound:
            self._clear()
            self.fail(ClientTooSlow(f"the client left more than {self._bound} bytes of its answer unread"), abort=True)
            self._owner.deliver_soon(self)
