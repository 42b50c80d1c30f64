"""How a Go program writes things: its JSON, its durations, its complaints about JSON."""

from __future__ import annotations

import decimal
import json
import math
from typing import Any

import msgspec

from broker.faces import go_json

_ESCAPED = (
    (b"<", b"\\u003c"),
    (b">", b"\\u003e"),
    (b"&", b"\\u0026"),
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
)
"""All five occur only within strings, so that replacing them in the finished text is right."""


def dumps(value: Any) -> bytes:
    """Compact JSON. The keys keep their order: a map's caller sorts them, a struct's does not."""
    data = msgspec.json.encode(value)
    for plain, escaped in _ESCAPED:
        data = data.replace(plain, escaped)
    return data


def duration(seconds: float) -> str:
    """As `time.Duration` prints itself: `500.1µs`, `1.23ms`, `2s`, `1m30s`."""
    ns = max(0, round(seconds * 1e9))
    if ns < 1_000_000_000:
        for unit, size in (("ms", 1_000_000), ("µs", 1_000)):
            if ns >= size:
                return _trimmed(ns, size) + unit
        return f"{ns}ns" if ns else "0s"
    minutes, rest = divmod(ns, 60_000_000_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}h" if hours else ""
    text += f"{minutes}m" if minutes or hours else ""
    return text + _trimmed(rest, 1_000_000_000) + "s"


def _trimmed(ns: int, size: int) -> str:
    whole, part = divmod(ns, size)
    digits = str(part).zfill(len(str(size)) - 1).rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)


def number(value: float) -> str:
    """As `%v` prints a float64: the fewest digits that mean it, with an exponent from a million on."""
    if not math.isfinite(value):
        return {"inf": "+Inf", "-inf": "-Inf"}.get(str(value), "NaN")
    exact = decimal.Decimal(repr(value)).normalize()
    power = exact.adjusted()
    if -4 <= power < 6:
        return f"{exact:f}"
    mantissa = exact.scaleb(-power)
    return f"{mantissa:f}e{power:+03d}"


def complaint(data: bytes, wanted: str) -> str:
    """What `encoding/json` says of bytes that are no JSON value of the type `wanted`."""
    if len(data) <= go_json.MOST_BYTES:
        said = go_json.syntax_error(data)
        if said is not None:
            return said
    try:
        tree = json.loads(data)
    except json.JSONDecodeError as e:
        rest = e.doc[e.pos :]
        if not rest.strip() or e.msg.startswith("Unterminated"):
            return "unexpected end of JSON input"
        return f"invalid character {rest[0]!r} looking for beginning of value"
    except ValueError:
        return "invalid character in string literal"
    except RecursionError:
        return "exceeded max depth"
    return f"json: cannot unmarshal {kind(tree)} into Go value of type {wanted}"


def kind(value: object) -> str:
    """Go's word for a JSON value's type."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    if value is None:
        return "null"
    return "array" if isinstance(value, list) else "object"
