"""A request as native engines get it: `broker.wire.Request`, put together from pieces that mostly are there already.

    0x97 0x42 incarnation | id | path | stream | headers .. name | transfer
    `opening`, per engine        `Forms.native`  `Forms.native`

Why not `wire.encode`: path and headers are those of the client's last request, and to make texts of them, a mapping
and a message costs more than all else that sending takes.
"""

from __future__ import annotations

from typing import Final

from broker import wire
from frontend.upstream.base import HOP_BY_HOP, Headers, UpstreamRequest

_NOT_SENT: Final = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"accept-encoding"}
"""Headers that mean nothing to an engine which reads the body from a frame and never compresses."""

_encode: Final = wire.encode
_NAME: Final = "x-request-id"
_TEXT_HEADS: Final = [_encode("x" * size)[: -size or None] for size in range(256)]
"""What stands before a text of so many bytes."""
_YES: Final = b"\xc3"
_NO: Final = b"\xc2"
_NOTHING: Final = b"\xc4\0"
"""No bytes."""


def opening(incarnation: bytes) -> bytes:
    """What requests to that life of an engine begin with."""
    whole = _encode(wire.Request(incarnation, 0, "", False, {}))
    return whole[: -len(b"\0\xa0\xc2\x80" + _NOTHING)]  # id, path, stream, headers, transfer


def encoded(begin: bytes, number: int, request: UpstreamRequest) -> bytes:
    """The message's first frame; `begin` is its engine's `opening`."""
    forms, ident, transfer = request.forms, request.ident, request.transfer
    written = None if forms is None else forms.native
    if written is None:
        written = _written(request.path, request.headers, named=bool(ident))
        if forms is not None:
            forms.native = written
    path, headers = written
    return b"".join(
        (
            begin,
            _encode(number),
            path,
            _YES if request.stream else _NO,
            headers,
            _text(ident) if ident else b"",
            _encode(transfer) if transfer else _NOTHING,
        )
    )


def _text(word: bytes) -> bytes:
    size = len(word)
    return _TEXT_HEADS[size] + word if size < 256 else _encode(word.decode("ascii"))


def _written(path: str, headers: Headers, *, named: bool) -> tuple[bytes, bytes]:
    """Path, and headers; `named`: the request's name must follow, whatever the headers say it is."""
    texts = _texts(headers)
    if not named:
        return _encode(path), _encode(texts)
    texts.pop(_NAME, None)
    texts[_NAME] = ""  # one byte, and the last
    return _encode(path), _encode(texts)[:-1]


def _texts(headers: Headers) -> dict[str, str]:
    """Names and values as text; a header sent several times as one list (RFC 9110, 5.3)."""
    plain: dict[str, str] = {}
    for name, value in headers:
        if name not in _NOT_SENT:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            plain[key] = f"{plain[key]}, {text}" if key in plain else text
    return plain
