"""The HTTP/1.1 transport: one pool of keep-alive connections per engine, one `HttpCall` per request.

http:// to engines on a trusted network, https:// where one registers so; no proxies, no redirects, no decoding: bytes
pass through.
No task, future or timer per request, unless a connection must be opened or waited for.

    http_response.py     bytes -> status, headers, body pieces             pure
    http_connection.py   one socket, one request at a time
    http_pool.py         the sockets of one engine
    http_intake.py       all those that answer, as long as their answers flow
    http.py              the transport: requests in, answers out
"""

from __future__ import annotations

import asyncio
from typing import Final

from broker.config import Config
from broker.errors import BadRequest, ConnectFailed, EngineSaturated, PenstockError, UpstreamBroken
from broker.faces import face_of
from broker.types import Instance
from frontend.known_heads import KnownHeads
from frontend.outbox import Outbox
from frontend.upstream.base import HOP_BY_HOP, AnswerHead, Call, Headers, Sink, Upstream, UpstreamRequest
from frontend.upstream.http_connection import Connection
from frontend.upstream.http_intake import HttpIntake
from frontend.upstream.http_pool import IDLE_S, Pool, Waiter

_NOT_SENT: Final = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
"""Ours to say, or already served: the body follows at once, so there is nothing to expect."""


class HttpUpstream(Upstream):
    """`Upstream` for HTTP engines. Create it on the running loop that it will live on."""

    def __init__(self, config: Config, outbox: Outbox | None = None, *, idle_s: float = IDLE_S) -> None:
        """`outbox`: the process's."""
        self._limit = config.upstream.connections
        self._connect_s = config.timeouts.connect_secs
        self._idle_s = idle_s
        # Where whoever forwards tries again anyway, a face may want to count every time that an engine is asked.
        self._revives = config.server.splitwise or not face_of(config).counts_lost
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(self._loop) if outbox is None else outbox
        self._intake = HttpIntake(self._loop)
        self._pools: dict[str, Pool] = {}
        self._retired: list[Pool] = []
        """Of removed instances, as long as answers are under way there."""
        self._known: KnownHeads[AnswerHead] = KnownHeads()
        self._closed = False

    def __repr__(self) -> str:
        return f"<HttpUpstream {list(self._pools.values())}>"

    def open(self, instance: Instance, request: UpstreamRequest, sink: Sink) -> Call:
        call = HttpCall(self._loop, self._connect_s, sink)
        try:
            if self._closed:
                raise ConnectFailed("the frontend is closing")
            pool = self._pools.get(instance.url)
            if pool is None:
                pool = self._pools[instance.url] = Pool(
                    instance.url,
                    self._limit,
                    self._loop,
                    self._idle_s,
                    self._known,
                    self._outbox,
                    self._intake,
                    revives=self._revives,
                )
            call.ask(pool, request)
        except PenstockError as e:
            self._loop.call_soon(call.fail, e)
        return call

    def forget(self, url: str) -> None:
        """The instance was removed. Answers under way go on; nothing is kept for later ones."""
        pool = self._pools.pop(url, None)
        if pool is not None:
            pool.retire()
            self._retired = [p for p in (*self._retired, pool) if not p.is_empty]

    def close(self) -> None:
        """Ends every connection; calls still open hear `fail`. The transport is of no more use."""
        self._closed = True
        pools = [*self._pools.values(), *self._retired]
        self._pools.clear()
        self._retired.clear()
        for pool in pools:
            pool.close(UpstreamBroken("the frontend is closing"))
        self._intake.close()


class HttpCall(Waiter):
    """One request at one engine: `Call` for whoever forwards, `Waiter` for the pool, `Exchange` for the connection.

    `_sink` is None once the call has ended, in whichever way: that is what makes every end the only one.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, connect_s: float, sink: Sink) -> None:
        super().__init__()
        self._loop = loop
        self._connect_s = connect_s
        self._sink: Sink | None = sink
        if sink.takes_whole:
            self.whole = sink
        self._pool: Pool | None = None
        self._connection: Connection | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._retried = False

    def __repr__(self) -> str:
        state = "ended" if self._sink is None else "open" if self._connection else "waiting"
        return f"<HttpCall {state}{' paused' if self.paused else ''}>"

    def ask(self, pool: Pool, request: UpstreamRequest) -> None:
        """Sends the request, or arranges that it will be. Raises what `fail` is to be told."""
        self.head = request_head(pool.address.authority, request)
        self.body = request.body
        if request.method == "HEAD":
            self.head_only = True
            self.whole = None
        self._pool = pool
        connection = pool.idle()
        if connection is not None:
            self._connection = connection
            connection.send(self)
        else:
            self._enter(pool)

    # -- whoever forwards ----------------------------------------------------------------------------------

    def cancel(self) -> None:
        if self._sink is not None:
            self._end()

    def pause(self) -> None:
        if not self.paused and self._sink is not None:
            self.paused = True
            if self._connection is not None:
                self._connection.pause()

    def resume(self) -> None:
        if self.paused and self._sink is not None:
            self.paused = False
            if self._connection is not None:
                self._connection.resume()

    # -- the connection's side -----------------------------------------------------------------------------

    def connecting(self, connection: Connection) -> None:
        self._connection = connection

    def answer(self, head: AnswerHead, data: bytes) -> None:
        sink = self.whole
        if sink is not None:
            self._connection = None  # already given back
            self._sink = self.whole = None
            if self._deadline is not None:
                self._deadline.cancel()
            sink.answer(head, data)

    def start(self, status: int, headers: Headers) -> None:
        self.head = self.body = b""  # the engine answers: they are not sent again, and a stream need not keep them
        if self._sink is not None:
            self._sink.start(status, headers)

    def write(self, data: bytes) -> None:
        if self._sink is not None:
            self._sink.write(data)

    def finish(self) -> None:
        sink = self._sink
        if sink is not None:
            self._connection = None  # already given back
            self._end()
            sink.finish()

    def fail(self, error: PenstockError) -> None:
        sink = self._sink
        if sink is not None:
            self._connection = None
            self._end()
            if self._retried and isinstance(error, ConnectFailed):
                # The first copy of the request went out on the connection that broke; it may have been read.
                said = "the connection broke before an answer; then: "
                error = UpstreamBroken(said + error.message, public=said + (error.public or error.message))
            sink.fail(error)

    def went_stale(self) -> None:
        pool = self._pool
        assert pool is not None
        self._connection = None
        if self._retried or not pool.revives:
            again = ", twice" if self._retried else ""
            self.fail(UpstreamBroken(f"the engine closed a kept connection instead of answering{again}"))
            return
        self._retried = True
        # Not another kept one: what closed this one has most likely closed them all.
        try:
            self._enter(pool)
        except EngineSaturated as e:
            self.fail(e)

    # -- ends ----------------------------------------------------------------------------------------------

    def _enter(self, pool: Pool) -> None:
        self._deadline = self._loop.call_later(self._connect_s, self._timed_out)
        pool.enter(self)

    def _timed_out(self) -> None:
        self._deadline = None
        connection = self._connection
        if connection is not None and connection.is_dialled:
            return
        pool = self._pool
        sink = self._sink
        if sink is None or pool is None:
            return
        if connection is None:
            error: PenstockError = EngineSaturated(f"no connection to {pool.url} became free in {self._connect_s:g} s")
        else:
            error = ConnectFailed(f"cannot connect to {pool.url} in {self._connect_s:g} s")
        self._end()
        sink.fail(error)

    def _end(self) -> None:
        self._sink = self.whole = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        connection, pool = self._connection, self._pool
        self._connection = None
        if pool is not None:
            if connection is not None:
                pool.discard(connection)
            else:
                pool.leave(self)


def request_head(authority: bytes, request: UpstreamRequest) -> bytes:
    """Request line and headers, blank line included. Raises `BadRequest` for what would not be one request."""
    forms = request.forms
    if forms is None:
        line, lines = _written(request.method, request.path, request.headers)
    else:
        if forms.http is None:
            shared = request.headers[:-1] if request.ident else request.headers
            forms.http = _written(request.method, request.path, shared)
        line, lines = forms.http
        if request.ident:
            lines = b"%b\r\nx-request-id: %b" % (lines, request.ident)
    if request.body or request.method not in ("GET", "HEAD"):
        return b"%b%b%b\r\nContent-Length: %d\r\n\r\n" % (line, authority, lines, len(request.body))
    return b"%b%b%b\r\n\r\n" % (line, authority, lines)


def _written(method: str, path: str, headers: Headers) -> tuple[bytes, bytes]:
    """The request line and the beginning of the Host line; the headers, each after its line break."""
    try:
        line = f"{method} {path} HTTP/1.1\r\nHost: ".encode("ascii")
    except UnicodeEncodeError as e:
        raise BadRequest("the path of the request must be ASCII; other characters are percent-encoded") from e
    kept = [pair for pair in headers if pair[0] not in _NOT_SENT]
    lines = b"".join([b"\r\n%b: %b" % pair for pair in kept])
    # A line break smuggled in by a path or a header would start a second request (or a header) of its own.
    breaks = lines.count(b"\r"), lines.count(b"\n"), line.count(b"\r"), line.count(b"\n"), line.count(b" ")
    if breaks != (len(kept), len(kept), 1, 1, 3) or b"\0" in lines or b"\0" in line:
        raise BadRequest("the path or a header of the request holds characters that HTTP does not allow there")
    return line, lines
