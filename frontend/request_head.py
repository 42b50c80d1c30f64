"""The head of an inference request: read once, in whichever way the request came in, and asked by all later steps."""

from __future__ import annotations

from typing import Final

from frontend import headers
from frontend.upstream.base import Forms, Headers

EXPLAIN = b"x-penstock-explain"
_OPAQUE: Final = (b"multipart/", b"audio/", b"image/", b"video/", b"application/octet-stream")
"""Bodies that are forwarded unread, as the audio routes take them; their model is not known."""
_ALWAYS_JSON: Final = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/embeddings"))


class RequestHead:
    """Good for every request with the same head: nothing in it is one request's own, and nothing is changed."""

    def __init__(
        self,
        path: str,
        target: str,
        headers: Headers,
        ident: bytes,
        session: str | None,
        is_read: bool,
        asks_why: bool,
        modern: bool,
        keep_alive: bool,
    ) -> None:
        self.path = path
        self.target = target
        """Path and query, as the client wrote them."""
        self.headers = headers
        """End-to-end ones, as engines get them; without `x-request-id` if the face gives requests names."""
        self.ident = ident
        """The client's own name of the request; nothing: it gets a new one."""
        self.session = session
        self.is_read = is_read
        """The body is JSON, and says what decides its way."""
        self.forms = Forms()
        self.asks_why = asks_why
        """Its client wants to be told why its instance was chosen."""
        self.modern = modern
        """The client speaks HTTP/1.1."""
        self.keep_alive = keep_alive

    def trace(self) -> str:
        return _first(self.headers, b"x_bd_logid").decode("latin-1")


def read_head(
    path: str, target: str, found: Headers, *, names: bool, modern: bool = True, keep_alive: bool = True
) -> RequestHead:
    """`found`: all headers; `names`: whether the face gives requests names."""
    first = dict(found[::-1])  # of each name its first value: one pass in C instead of a search for each
    return RequestHead(
        path,
        target,
        headers.for_engine(found, names=names),
        headers.own_id(found) if headers.REQUEST_ID in first else b"",
        first.get(b"x-session-id", b"").decode("latin-1") or None,
        path in _ALWAYS_JSON or not first.get(b"content-type", b"").lower().startswith(_OPAQUE),
        first.get(EXPLAIN) == b"1",
        modern,
        keep_alive,
    )


def says_too_large(found: Headers, limit: int) -> bool:
    """Whether the client announces more than it may send."""
    declared = _first(found, b"content-length")
    return declared.isdigit() and int(declared) > limit


def _first(found: Headers, name: bytes) -> bytes:
    """The first value of a header, or nothing."""
    for key, value in found:  # no generator: it would cost more than the search
        if key == name:
            return value
    return b""
