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

_NAME: Final = "x-request-id"
_YES: Final = b"\xc3"
_NO: Final = b"\xc2"
_NOTHING: Final = b"\xc4\0"
"""No bytes."""


def opening(incarnation: bytes) -> bytes:
    """What requests to that life of an engine begin with."""
    whole = wire.encode(wire.Request(incarnation, 0, "", False, {}))
    return whole[: -len(b"\0\xa0\xc2\x80" + _NOTHING)]  # id, path, stream, headers, transfer


def encoded(begin: bytes, number: int, request: UpstreamRequest) -> bytes:
    """The message's first frame; `begin` is its engine's `opening`."""
    forms, name = request.forms, b""
    if request.ident:
        name = wire.encode(request.ident.decode("ascii"))
    if forms is None:
        path, headers = _written(request.path, request.headers, named=bool(name))
    else:
        if forms.native is None:
            forms.native = _written(request.path, request.headers, named=bool(name))
        path, headers = forms.native
    stream = _YES if request.stream else _NO
    transfer = wire.encode(request.transfer) if request.transfer else _NOTHING
    return b"".join((begin, wire.encode(number), path, stream, headers, name, transfer))


def _written(path: str, headers: Headers, *, named: bool) -> tuple[bytes, bytes]:
    """Path, and headers; `named`: the request's name must follow, whatever the headers say it is."""
    texts = _texts(headers)
    if not named:
        return wire.encode(path), wire.encode(texts)
    texts.pop(_NAME, None)
    texts[_NAME] = ""  # one byte, and the last
    return wire.encode(path), wire.encode(texts)[:-1]


def _texts(headers: Headers) -> dict[str, str]:
    """Names and values as text; a header sent several times as one list (RFC 9110, 5.3)."""
    plain: dict[str, str] = {}
    for name, value in headers:
        if name not in _NOT_SENT:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            plain[key] = f"{plain[key]}, {text}" if key in plain else text
    return plain
