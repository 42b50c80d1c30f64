"""Reads one HTTP/1.1 response after another from bytes: a plain object, no socket, no clock.

What the bytes mean is httptools' business (llhttp); what it leaves to its user is decided here:

* 1xx responses are swallowed; 101 is refused, since nobody asks for an upgrade;
* 204, 304 and answers to HEAD end with their headers, whatever those announce;
* without Content-Length and chunks the body ends with the connection (`end`);
* status line and headers are bounded, and so are trailers and chunk lines;
* a response whose framing is not beyond doubt is refused, never guessed: request smuggling lives on guesses;
* a connection is worth a second request only if the response ended exactly where its bytes did.

Callbacks only note what was read. Whoever feeds looks at the result afterwards, so nothing happens in the
middle of the parser, and all chunks of one read become one write to the client.
"""

from __future__ import annotations

import httptools

from broker.errors import UpstreamBroken
from frontend.upstream.base import HOP_BY_HOP, Headers

MAX_HEAD_BYTES = 64 * 1024
"""Names and values of one head, and bytes read in a row that bring neither head nor body to an end."""


_DEAF = httptools.HttpResponseParser(object())
"""The parser of readers that are closed; it calls nobody."""


class ResponseReader:
    """The response under way on one connection. `begin`, then `feed` until `complete` or `error`, then `begin`.

    `status` is 0 until the head is whole; `headers` are end-to-end ones with lower-case names.
    """

    __slots__ = (
        "_chunked",
        "_dry_bytes",
        "_ended",
        "_head_bytes",
        "_head_only",
        "_interim",
        "_length",
        "_named",
        "_parser",
        "_parts",
        "_until_close",
        "complete",
        "error",
        "headers",
        "is_between",
        "lines",
        "reusable",
        "status",
    )

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.begin()

    def __repr__(self) -> str:
        state = "broken" if self.error else "complete" if self.complete else "open"
        return f"<ResponseReader status={self.status} {state}{' reusable' if self.reusable else ''}>"

    def begin(self, *, head_only: bool = False) -> None:
        """Expects a response from here on; `head_only`: to HEAD, which never has a body."""
        self.status = 0
        self.headers: Headers = []
        self.complete = False
        self.is_between = False
        """The parser stands between two chunks of the body."""
        self.reusable = False
        """After `complete`: nothing came after the response, and the engine keeps the connection open."""
        self.error: UpstreamBroken | None = None
        self._parts: list[bytes] = []
        self._head_only = head_only
        self._interim = False
        self._ended = False
        self._until_close = False
        self._chunked = False
        self._length = False
        self._named: set[bytes] | None = None
        self.lines = 0
        """Headers so far, trailers and those of interim answers included."""
        self._head_bytes = 0
        self._dry_bytes = 0

    def feed(self, data: bytes) -> None:
        """Reads on. Never raises: `error` says what was wrong; what was read before it stands."""
        if self._ended:
            self.reusable = False
            return
        self._dry_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if self.is_between and not data.endswith(b"\n"):  # the next chunk's size has begun
                self.is_between = False
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as e:
            self._ended = True
            self.reusable = False
            if not self.complete and self.error is None:
                self.error = UpstreamBroken(f"the engine's response is malformed: {e}")
                self.error.__cause__ = e
        if self._dry_bytes > MAX_HEAD_BYTES and not self.complete and self.error is None:
            self._refuse(f"has a head or chunk line longer than {MAX_HEAD_BYTES} bytes")

    def end(self) -> None:
        """The engine closed its side: the end of a body without a length, else a response cut short."""
        self._ended = True
        self.reusable = False
        if self.complete or self.error is not None:
            return
        if self._until_close:
            self.complete = True
        else:
            self.error = UpstreamBroken("the engine closed the connection before its response was whole")

    def close(self) -> None:
        """Nothing is read from here on. Idempotent.

        The parser holds our callbacks, a cycle that would wait for the collector; and that comes so rarely
        (`frontend.__main__`) that the readers of two thousand aborted requests would lie there.
        """
        self._parser = _DEAF

    @property
    def has_body(self) -> bool:
        """`take` has something to give."""
        return bool(self._parts)

    def take(self) -> bytes:
        """The body bytes read since the last `take`; only when `has_body`."""
        parts = self._parts
        self._parts = []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # -- httptools' callbacks, in the order of a message ---------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:  # a second response, or garbage, behind ours
            self._ended = True
            self.reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.lines += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > MAX_HEAD_BYTES:
            self._stop(f"has a head of more than {MAX_HEAD_BYTES} bytes")
        if self.status or self.complete:
            return  # trailers end with the framing they belong to
        name = name.lower()
        value = value.rstrip(b" \t")
        if name == b"content-length":
            self._length = True
        elif name in HOP_BY_HOP:
            if name == b"transfer-encoding":
                # Other codings would have to be undone, and we never said (TE) that we can.
                if self._chunked or value.lower() != b"chunked":
                    self._stop("has a transfer coding other than chunked")
                self._chunked = True
            elif name == b"connection":
                named = {word.strip().lower() for word in value.split(b",")}
                self._named = named if self._named is None else self._named | named
            return
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.complete:
            return
        status = self._parser.get_status_code()
        if status < 200:
            if status < 100 or status == 101 or self._length or self._chunked:
                self._stop(f"has the status {status} where none is due")
            self._interim = True
            self.headers = []
            self._named = None
            return
        if status > 599:
            self._stop(f"has the unknown status {status}")
        if self._named:
            # Whatever Connection names belongs to the connection, except what frames the body.
            hop = self._named - {b"content-length"}
            self.headers = [pair for pair in self.headers if pair[0] not in hop]
        if status == 204 and self._length:  # it may not have one (RFC 9110, 8.6): who believed it would wait for a body
            self.headers = [pair for pair in self.headers if pair[0] != b"content-length"]
        self.status = status
        self._dry_bytes = 0
        if self._head_only or status == 204 or status == 304:
            self.complete = True
        else:
            self._until_close = not (self._length or self._chunked)

    def on_body(self, body: bytes) -> None:
        if self.complete:  # a body where none may be
            self._ended = True
            return
        self._dry_bytes = 0
        self._parts.append(body)

    def on_chunk_header(self) -> None:
        self.is_between = False

    def on_chunk_complete(self) -> None:
        self.is_between = True

    def on_message_complete(self) -> None:
        self.is_between = False
        if self._interim:
            self._interim = False
        elif self.status and not self._ended:
            self.complete = True
            self.reusable = self._parser.should_keep_alive()

    def _stop(self, what: str) -> None:
        """Refuses from within a callback; the exception makes the parser stop there."""
        self._refuse(what)
        raise ValueError(what)

    def _refuse(self, what: str) -> None:
        self._ended = True
        self.reusable = False
        self.error = UpstreamBroken(f"the engine's response {what}")
