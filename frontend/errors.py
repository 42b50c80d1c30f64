"""The one place where an error becomes bytes for a client."""

from __future__ import annotations

from broker.errors import PenstockError, Unread
from broker.faces import Face
from frontend.upstream.base import Headers


class Stopping(PenstockError):
    """This frontend stops, and the time that running streams get is over."""

    status = 503
    kind = "service_unavailable"
    code = "stopping"
    retry_after_s = 1


class UnknownRequest(PenstockError):
    """Nobody remembers a request of that id."""

    status = 404
    kind = "invalid_request_error"
    code = "unknown_request"


class Malformed(Unread):
    """What came is no HTTP request, or one that can be read in two ways."""

    code = "malformed_request"


class HeadTooLarge(Unread):
    status = 431
    code = "head_too_large"


class BodyTooSlow(Unread):
    """The client announced a body and stopped sending it."""

    status = 408
    code = "body_too_slow"


def event(error: PenstockError, face: Face) -> bytes:
    """The error as the last event of a stream that broke; no `[DONE]` follows, so it cannot pass for a whole one."""
    return b"data: " + face.error(error).body + b"\n\n"


def whole(error: PenstockError, face: Face) -> tuple[int, bytes, Headers]:
    """Status, body and headers of an answer made of an error."""
    status, kind, data = face.error(error)
    found = [(b"content-type", kind.encode())]
    if error.retry_after_s is not None:
        found.append((b"retry-after", str(error.retry_after_s).encode()))
    return status, data, [*found, *error.headers]
