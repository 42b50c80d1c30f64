"""Which headers pass through, and the name of a request."""

from __future__ import annotations

import os
import re
from binascii import hexlify
from collections.abc import Iterable
from typing import Final

from frontend.upstream.base import HOP_BY_HOP, Headers

REQUEST_ID: Final = b"x-request-id"

# Ours to say on the engine's connection. `expect` has been answered here: the body is already read.
_NOT_FORWARDED_BUT_ID: Final = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
_NOT_FORWARDED: Final = _NOT_FORWARDED_BUT_ID | {REQUEST_ID}
# Ours to say on the client's connection: the server adds its own date.
_NOT_RETURNED_BUT_ID: Final = HOP_BY_HOP | {b"date"}
_NOT_RETURNED: Final = _NOT_RETURNED_BUT_ID | {REQUEST_ID}

_ID_BYTES: Final = 12
_drawn: Final[list[bytes]] = []
"""Names that nothing has yet: many are drawn at once, as to ask for each takes ten times as long."""
_DRAWN: Final = 256

_ID: Final = re.compile(rb"[A-Za-z0-9._:/@+=,-]{1,256}")


def own_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The client's id if it is harmless in a header and a log line, else nothing."""
    for name, value in headers:
        if name == REQUEST_ID and _ID.fullmatch(value):
            return value
    return b""


def new_id() -> bytes:
    if not _drawn:
        digits = hexlify(os.urandom(_DRAWN * _ID_BYTES))
        _drawn.extend([digits[at : at + 2 * _ID_BYTES] for at in range(0, len(digits), 2 * _ID_BYTES)])
    return _drawn.pop()


def for_engine(headers: Iterable[tuple[bytes, bytes]], *, names: bool) -> Headers:
    """The client's end-to-end headers; `names`: without the request's id, which is ours to add."""
    return _end_to_end(headers, _NOT_FORWARDED if names else _NOT_FORWARDED_BUT_ID)


def for_client(headers: Iterable[tuple[bytes, bytes]], ident: bytes) -> Headers:
    """The engine's end-to-end headers, with the request's id; without one, as they came."""
    passed = returned(headers, names=bool(ident))
    if ident:
        passed.append((REQUEST_ID, ident))
    return passed


def returned(headers: Iterable[tuple[bytes, bytes]], *, names: bool) -> Headers:
    """The engine's end-to-end headers; `names`: without the request's id, which is ours to add."""
    return _end_to_end(headers, _NOT_RETURNED if names else _NOT_RETURNED_BUT_ID)


def _end_to_end(headers: Iterable[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> Headers:
    passed, named = [], []
    for pair in headers:
        if pair[0] not in dropped:
            passed.append(pair)
        elif pair[0] == b"connection":
            named.append(pair[1])
    if named:
        # `Connection: x-mine` makes x-mine a header of that one connection (RFC 9110, 7.6.1). Framing is not the
        # peer's to drop: without the length, an answer that ends early would look whole.
        tokens = {token.strip().lower() for value in named for token in value.split(b",")} - {b"content-length"}
        passed = [pair for pair in passed if pair[0] not in tokens]
    return passed


def are_of_events(headers: Headers) -> bool:
    """Whether what follows is a stream of server-sent events."""
    for name, value in headers:  # compiled, a generator costs more than all it looks at
        if name == b"content-type" and value.strip().lower().startswith(b"text/event-stream"):
            return True
    return False


def take_events(headers: Headers) -> bool:
    """Whether an event can be added to an answer with these."""
    for name, value in headers:
        if name == b"content-length" or (name == b"content-encoding" and value != b"identity"):
            return False
    return are_of_events(headers)
