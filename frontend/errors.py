"""The one place where an error becomes bytes for a client."""

from __future__ import annotations

import msgspec

from broker.errors import BadRequest, PenstockError
from frontend.upstream.base import Headers


class Stopping(PenstockError):
    """This frontend stops, and the time that running streams get is over."""

    status = 503
    kind = "service_unavailable"
    code = "stopping"
    retry_after_s = 1


class NotFound(PenstockError):
    status = 404
    kind = "invalid_request_error"
    code = "not_found"


class MethodNotAllowed(PenstockError):
    status = 405
    kind = "invalid_request_error"
    code = "method_not_allowed"


class Malformed(BadRequest):
    """What came is no HTTP request, or one that can be read in two ways."""

    code = "malformed_request"


class HeadTooLarge(BadRequest):
    status = 431
    code = "head_too_large"


def body(error: PenstockError) -> bytes:
    """OpenAI's error form."""
    fields = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return msgspec.json.encode({"error": fields})


def event(error: PenstockError) -> bytes:
    """The same as the last event of a stream that broke; no `[DONE]` follows, so it cannot pass for a whole one."""
    return b"data: " + body(error) + b"\n\n"


def headers(error: PenstockError) -> Headers:
    found = [(b"content-type", b"application/json")]
    if error.retry_after_s is not None:
        found.append((b"retry-after", str(error.retry_after_s).encode()))
    found += error.headers
    return found
