"""A client's connection: uvicorn's protocol, with the lean path in it, and stricter.

    bytes --httptools--> head --+-- POST /v1/… --> LeanCycle --------------------------> Forward
                                |                      one is running, the others queue up in uvicorn's `pipeline`
                                +-- other -------> RequestResponseCycle (uvicorn) ----> starlette

Both kinds of requests may come on one connection, in any order and without waiting; they are answered in theirs.

What is done here for both kinds, because uvicorn leaves it to others or does it differently:

* Reading is never left paused while an answer is awaited: the client's leaving must be seen. Instead, what a client
  sends ahead is bounded; when it sends more, the connection ends after the answers that are due.
* A client that ends its half of the connection has left: its kernel says the same when it was killed.
* A malformed request behind a good one is answered in its turn, and not in the middle of the good one's answer.
* A request whose framing or target is not beyond doubt is refused, and its head is bounded. (httptools refuses most
  such shapes by itself; tests/frontend/conformance.py has them all.)
* Trailers end with the framing they belong to; uvicorn adds them to the headers.

The names of uvicorn's that are used here are held fast by tests/frontend/test_uvicorn_names.py.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from broker.counters import FrontendCounters, TotalColumn
from broker.errors import PenstockError
from broker.faces import PENSTOCK
from frontend.account import count_response
from frontend.answer import PAUSE_AT, whole_error
from frontend.api import too_large
from frontend.client import Client
from frontend.errors import BodyTooSlow, HeadTooLarge, Malformed
from frontend.idle import IdleConnections, Silence
from frontend.lean import Lean, LeanCycle
from frontend.outbox import Outbox
from frontend.request_head import read_head, says_too_large

logger = logging.getLogger("frontend")

FIRST_REQUEST_S = 1.0
"""How long a connection without a request yet is waited for when stopping,"""
NEXT_REQUEST_S = 0.3
"""and how long one that has had some. Nobody asks for long in vain: what comes is answered, as the last."""
MAX_HEAD_BYTES = 64 * 1024
"""Bytes that may be read without bringing a head, a part of a body, or a request to its end; looked at after each
read, which adds what it brings."""
MAX_AHEAD = 64
"""Requests that may wait behind the running one."""
MAX_AHEAD_BYTES = 256 * 1024
"""Bytes of bodies among them."""

Cycle = LeanCycle | RequestResponseCycle


class Connection(HttpToolsProtocol):
    """Owned by its transport. `cycle` (uvicorn's name) is the request that was read last, `_running` the one whose
    answer is due; between them are those in `pipeline`."""

    cycle: Any
    """Of either kind: as long as a connection is not being lost, uvicorn looks at nothing of a cycle but
    `response_complete` and `keep_alive`, which a `LeanCycle` has."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        app_state: dict[str, Any],
        counters: FrontendCounters,
        idle: IdleConnections,
        lean: Lean | None,
        bound: int = PAUSE_AT,
        outbox: Outbox | None = None,
    ) -> None:
        """`bound`: what one slow client may hold, in bytes. Without `lean`, every request goes to the application.
        `outbox`: the process's, for what lean requests write."""
        super().__init__(config=config, server_state=state, app_state=app_state)
        self._counters = counters
        self._idle = idle
        self._silence: Silence  # from when there is a transport on
        self._lean = lean
        self._bound = bound
        self._client: Client | None = None  # what the transport calls instead of us, as long as there is one
        self._outbox = Outbox(self.loop) if outbox is None else outbox
        self._running: Cycle | None = None
        self._requested = False
        self._stopping = False
        self._is_advancing = False
        self._in_body = False
        self._is_full = False  # whatever comes now is no longer read
        self._refusal: PenstockError | None = None  # to be said when all answers before it have been
        self._upgrades = False
        self._request_line = b""  # of a request that upgrades
        self._keeps_alive_with_body = False
        self._dry_bytes = 0
        self._is_between = True  # the parser stands between two requests
        self._fresh = b""  # what begins with the request being read, until its head is whole

    # -- the transport's callbacks -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass
        super().connection_made(transport)
        self._silence = self._idle.watch(self)
        if self._lean is not None:
            peer = self.client[0] if self.client else ""
            self._client = Client(self, transport, peer, self._lean, self.server_state, self._silence, self._outbox)
            transport.set_protocol(cast("asyncio.Protocol", self._client))  # by its methods
        if self._bound < PAUSE_AT:  # which is the transports' own
            transport.set_write_buffer_limits(high=self._bound)
        self._counters.count(TotalColumn.CONNECTIONS_OPENED)

    def connection_lost(self, exc: Exception | None) -> None:
        self._counters.count(TotalColumn.CONNECTIONS_CLOSED)
        self._idle.forget(self._silence)
        self._part()
        self._client = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_full:
            return
        if self._is_between and self._running is None:
            self._fresh = data
        self._dry_bytes += len(data)
        rest = data
        try:
            while rest:
                try:
                    self.parser.feed_data(rest)
                    rest = b""
                except httptools.HttpParserUpgrade as upgrade:
                    rest = self._decline_upgrade() + rest[upgrade.args[0] :]
            if self._dry_bytes > MAX_HEAD_BYTES and not self._is_full:
                raise self._refuse(HeadTooLarge(f"a head or chunk line is larger than {MAX_HEAD_BYTES} bytes"))
            if self._in_body and not self._is_between:
                self._wait_for_body()
        except (httptools.HttpParserError, PenstockError) as error:
            cause = error.__context__
            if self._refusal is None and cause is not None and not isinstance(cause, httptools.HttpParserError):
                logger.error("a request could not be read", exc_info=cause)
            self._break_off(self._refusal or Malformed(f"the request is malformed: {error}"))

    def eof_received(self) -> None:
        if self._running is not None:
            self._abort()
            self._part()

    def pause_writing(self) -> None:
        super().pause_writing()
        if isinstance(self._running, LeanCycle):
            self._running.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        if isinstance(self._running, LeanCycle):
            self._running.resume()

    # -- httptools' callbacks, in the order of a request -------------------------------------------------------

    def on_message_begin(self) -> None:
        # What uvicorn makes here is made when it is known that the request is uvicorn's: see `on_headers_complete`.
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._in_body = self._is_between = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        fresh, self._fresh = self._fresh, b""
        self._requested = self._in_body = True
        self._dry_bytes = 0
        self._silence.end()
        if self._is_full:
            return
        modern = self._check_head()
        self._upgrades = self.parser.should_upgrade()
        if self._upgrades:
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":
                raise self._refuse(Malformed("no tunnels here"))
            self._request_line = b"%b %b HTTP/%b\r\n" % (method, self.url, version)
            return  # comes once more, see `_decline_upgrade`
        if len(self.pipeline) >= MAX_AHEAD or self.transport.is_closing():
            self._stop_reading()
            return
        if self._lean is not None and self._client is not None and self._lean.takes(self.parser.get_method(), self.url):
            keep_alive = modern and self.parser.should_keep_alive()
            target, found = self.url.decode("ascii"), self.headers
            path = target.partition("?")[0]
            head = read_head(path, target, found, names=self._lean.names, modern=modern, keep_alive=keep_alive)
            if fresh and not head.ident and not self.expect_100_continue:
                self._lean.known.learn(fresh, len(found), head)
            cycle = self._lean.cycle(self._client, head, keep_alive=keep_alive and not self._stopping)
            if says_too_large(found, self._lean.inference.limit):
                cycle.refuse(too_large(self._lean.inference.limit))
            self.headers = []
            self.cycle = cycle
            if self._running is None:
                self._start_asgi_task(self.cycle, self.app)
            else:
                self.pipeline.appendleft((self.cycle, self.app))
        else:
            url, found = self.url, self.headers
            if not httptools.parse_url(url).path:  # `http://host`: uvicorn would fail over it
                raise self._refuse(Malformed("the target has no path"))
            super().on_message_begin()
            for name, value in found:
                super().on_header(name, value)
            self.url = url
            super().on_headers_complete()
            self.flow.resume_reading()  # uvicorn stops reading when one request waits for another
            if not modern:
                self.cycle.waiting_for_100_continue = False  # HTTP/1.0 knows no interim answers
            if self._stopping:
                self.cycle.keep_alive = False
            self._keeps_alive_with_body = self.cycle.waiting_for_100_continue and self.cycle.keep_alive
            if self._keeps_alive_with_body:
                self.cycle.keep_alive = False  # an answer without 100: whether the body follows nobody knows

    def on_body(self, body: bytes) -> None:
        self._dry_bytes = 0
        cycle = self._current
        if self._is_full or cycle is None or cycle.response_complete:
            return
        if isinstance(cycle, LeanCycle):
            cycle.feed(body)
            self._go_on(cycle)
        else:
            self._body_comes()
            super().on_body(body)
        if cycle is not self._running and self._bytes_ahead() > MAX_AHEAD_BYTES:
            self._drop_last()
            self._stop_reading()

    def on_message_complete(self) -> None:
        self._dry_bytes = 0
        self._is_between = True
        if self._running is not None:
            self._silence.end()
        cycle = self._current
        if self._is_full or self._upgrades or cycle is None or cycle.response_complete:
            return
        if isinstance(cycle, LeanCycle):
            cycle.more_body = False
            self._go_on(cycle)
        else:
            self._body_comes()
            super().on_message_complete()

    def _wait_for_body(self) -> None:
        """A read has ended in the middle of a body."""
        cycle = self._current
        if isinstance(cycle, LeanCycle):
            cycle.goes_on()
            self._go_on(cycle)
        if self._running is cycle:
            self._silence.begin()  # its body comes, and must go on coming

    def _body_comes(self) -> None:
        if self._keeps_alive_with_body:
            self._keeps_alive_with_body = False
            self.cycle.keep_alive = not self._stopping

    def _decline_upgrade(self) -> bytes:
        """The head without its Upgrade, for a new parser: httptools takes what follows it for another protocol, and
        not for the body. (Java's HttpClient offers h2c with the first request of every connection.)"""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        lines = [b"%b: %b\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
        return b"".join((self._request_line, *lines, b"\r\n"))

    # -- the running request -----------------------------------------------------------------------------------

    @property
    def is_at_rest(self) -> bool:
        """No request is under way or half read, and none is refused."""
        return self._running is None and self._is_between and not self._is_full

    def adopt(self, cycle: LeanCycle) -> None:
        """A request that `Client` began is under way, and is one of ours from now on."""
        self._running = self.cycle = cycle

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """uvicorn's name for: it is this request's turn."""
        self._running = running = cast("Cycle", cycle)
        if running.more_body:
            self._silence.begin()
        if isinstance(running, LeanCycle):
            if running.more_body and running is self._current and self.expect_100_continue:
                if running.is_ready:  # refused: whether its body will follow nobody knows
                    running.keep_alive = False
                elif self.parser.get_http_version() == "1.1":
                    self._outbox.flush()
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._go_on(running)
        else:
            self._outbox.flush()  # uvicorn writes by itself
            super()._start_asgi_task(cycle, app)

    def _go_on(self, cycle: LeanCycle) -> None:
        if cycle is self._running and cycle.is_ready:
            cycle.begin()

    def on_response_complete(self) -> None:
        """The running request, of whichever kind, has been answered."""
        self.server_state.total_requests += 1
        self._running = None
        self._advance()

    def _advance(self) -> None:
        """The next request's turn, or what comes after the last. A loop: a thousand that are refused at once must not
        become a thousand frames."""
        if self._is_advancing:
            return
        self._is_advancing = True
        while self._running is None and not self.transport.is_closing():
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
            elif self._refusal is not None:
                self._say(self._refusal)
            elif self._is_full:
                self._close()
            else:
                self._silence.begin()
                if self._client is not None:
                    self._client.is_free = self.is_at_rest
                break
        self._is_advancing = False

    def _part(self) -> None:
        """The client has left: whoever works for it is told."""
        for cycle in (self._running, *(cast("Cycle", cycle) for cycle, _ in self.pipeline)):
            _tell_gone(cycle)
        self._running = None
        self._is_full = True
        self.pipeline.clear()
        if isinstance(self._current, LeanCycle):
            self.cycle = None  # uvicorn tells it, too, in its own way

    # -- what the server and the idle timer ask for ------------------------------------------------------------

    def shutdown(self) -> None:
        # uvicorn would close an idle one at once. Without the wait: (1) the client connects, or is told that it may go
        # on, (2) it sends a request, (3) we close, and the request is never read, though all was well when it was made.
        requested = self._requested
        if self._client is not None:
            self._client.step_aside()
            requested = requested or self._client.has_served
        if self._stopping or self._running is not None:
            self._shut_down()
        else:
            self.loop.call_later(NEXT_REQUEST_S if requested else FIRST_REQUEST_S, self._shut_down)
        self._stopping = True

    def idled(self) -> None:
        if self._running is None:
            self._close()
        elif self._running is self._current and not self._is_between:
            self._break_off(BodyTooSlow("the rest of the body did not come"))

    # -- after what was sent: the answers of lean requests may still be in the outbox ---------------------------

    def _shut_down(self) -> None:
        self._outbox.flush()
        super().shutdown()

    def _close(self) -> None:
        self._outbox.flush()
        self.transport.close()

    def _abort(self) -> None:
        self._outbox.flush()
        self.transport.abort()

    # -- refusals ----------------------------------------------------------------------------------------------

    @property
    def _current(self) -> Cycle | None:
        """The request that was read last, or is being read."""
        return cast("Cycle | None", self.cycle)

    def _check_head(self) -> bool:
        """Whether the client speaks HTTP/1.1. Raises what httptools lets pass although it can be read in two ways."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise self._refuse(Malformed(f"HTTP/{version} is not spoken here"))
        names = [name for name, _ in self.headers]
        if b"expect" in names or b"transfer-encoding" in names:
            self._check_framing(version)
        hosts = names.count(b"host")
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise self._refuse(Malformed("exactly one Host header is expected"))
        return version == "1.1"

    def _check_framing(self, version: str) -> None:
        for name, value in self.headers:
            if name == b"expect":
                self.expect_100_continue = value.lower() == b"100-continue"
            elif name == b"transfer-encoding" and (value.lower() != b"chunked" or version == "1.0"):
                raise self._refuse(Malformed("a transfer coding other than chunked is not understood"))

    def _refuse(self, error: PenstockError) -> PenstockError:
        """Notes what the exception will mean when httptools has wrapped it."""
        self._refusal = error
        return error

    def _bytes_ahead(self) -> int:
        return sum(
            cycle.held_bytes if isinstance(cycle, LeanCycle) else len(cycle.body)
            for cycle in (cast("Cycle", cycle) for cycle, _ in self.pipeline)
        )

    def _drop_last(self) -> None:
        """The request being read will not be answered."""
        cycle, _ = self.pipeline.popleft()
        _tell_gone(cast("Cycle", cycle))

    def _stop_reading(self) -> None:
        """The client sent too much ahead: the connection ends after the answers that are due."""
        self._is_full = True
        last = self.pipeline[0][0] if self.pipeline else self._running
        if last is not None:
            last.keep_alive = False

    def _break_off(self, error: PenstockError) -> None:
        """What comes cannot be understood: it is said when the answers before it are out, and nothing more is read."""
        self._is_full = True
        self._refusal = error
        broken = self._current
        if broken is not None and broken.more_body and not broken.response_complete:
            if broken is not self._running:
                self._drop_last()
            elif isinstance(broken, RequestResponseCycle) and broken.response_started:
                self._abort()
            else:
                _tell_gone(broken)
                self._running = None
        self._advance()

    def _say(self, error: PenstockError) -> None:
        """Refuses what was no request, and ends the connection."""
        self._counters.count(TotalColumn.REJECTED)
        count_response(self._counters, error.status)
        face = PENSTOCK if self._lean is None else self._lean.inference.face
        status, data, found = whole_error(error, b"", face)
        lines = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *found, (b"connection", b"close")):
            lines += (name, b": ", value, b"\r\n")
        self._outbox.flush()
        self.transport.write(b"".join((*lines, b"\r\n", data)))
        self.transport.close()


def _tell_gone(cycle: Cycle | None) -> None:
    if isinstance(cycle, LeanCycle):
        cycle.leave()
    elif cycle is not None and not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()
