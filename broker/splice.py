"""Change top-level members of a JSON object and leave every other byte as it came.

A body that is decoded and encoded again has lost its formatting, big integers and whatever else the encoder thinks
equal. Here the body is only looked at:

    { "model" : "a" , "messages" : [ ... ] , "stream" : true }
      key      value                        one member = one regex match for the key, one jump over the value

The decoder validates the whole and hands out each value undecoded, which tells how far to jump: no value is read
in Python. A 32 KiB body of prose costs 16 us, one of tool definitions 20; orjson's decoding and encoding 13 and 110,
the standard library's 75 and 460 (benchmarks/test_codec.py). A regex that steps over strings and brackets instead
costs 130 and 550.

An object that holds one key twice is refused, however the keys are spelled: which of the two an engine would
believe is unknown, so a client could smuggle in what was to be replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from broker.errors import UNDECODABLE, BadRequest

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MEMBER = re.compile(rb'[ \t\n\r]*,?[ \t\n\r]*("[^"\\]*+(?:\\.[^"\\]*+)*+")[ \t\n\r]*:[ \t\n\r]*')
"""What stands before a value; the bytes are known to be valid JSON, so the optional comma lets nothing wrong pass."""
_END = re.compile(rb"[ \t\n\r]*\}[ \t\n\r]*")
MOST_MEMBERS = 4096
"""Of the object itself: each is a step of a loop in Python."""
MOST_COLONS = 1 << 18
"""Of the whole text, which has no more members than these. Beyond, the decoder alone would stop the loop, and with it
every stream, for seconds: one of 60 MiB with nothing but members took 19, and a GiB."""


def find_member(body: bytes, name: str) -> tuple[int, int] | None:
    """Where the value of a top-level member begins and ends, or None. Raises `BadRequest` as `members` does."""
    return members(body).get(name)


def replace_member(body: bytes, name: str, value: bytes) -> bytes:
    """The body with that member's value replaced, or with the member added at the end.

    `value` is JSON and is trusted. Raises `BadRequest` as `members` does.
    """
    found = members(body)
    if name in found:
        start, end = found[name]
        return b"".join((body[:start], value, body[end:]))
    key = msgspec.json.encode(name)
    if found:
        _, end = next(reversed(found.values()))
        return b"".join((body[:end], b",", key, b":", value, body[end:]))
    end = body.index(b"{") + 1
    return b"".join((body[:end], key, b":", value, body[end:]))


def edit_members(body: bytes, changes: Mapping[str, bytes | None]) -> bytes:
    """The body with several members changed at once: None takes one out (with the comma that it needed), a value
    replaces the one that is there or is added at the end.

    Values are JSON and are trusted. Raises `BadRequest` as `members` does.
    """
    found = members(body)
    added = {name: value for name, value in changes.items() if name not in found}
    first = at = body.index(b"{") + 1
    pieces: list[bytes] = []
    for name, (start, end) in found.items():
        value = changes.get(name, body[start:end])
        if value is not None:
            # What stands before a value: ` , "n" : `. Once those before it are gone, the comma goes, too.
            before = body[at:start]
            pieces += (before if pieces or at == first else before.lstrip(b", \t\n\r"), value)
        at = end
    for name, new in added.items():
        if new is not None:
            pieces += (b"," if pieces else b"", msgspec.json.encode(name), b":", new)
    return b"".join((body[:first], *pieces, body[at:]))


def members(body: bytes) -> dict[str, tuple[int, int]]:
    """Start and end of each top-level value, in the order of the body.

    Raises `BadRequest` if the body is not JSON, not UTF-8, not an object, names one member twice, or has too many.
    """
    if len(body) > MOST_COLONS and body.count(b":") > MOST_COLONS:
        raise BadRequest(f"the body has more than {MOST_COLONS} colons, and something in it must be replaced")
    try:
        body.decode()  # the decoder does not look into strings that it skips
        values = _OBJECT.decode(body)
    except msgspec.ValidationError as e:
        raise BadRequest("the body is not a JSON object") from e
    except UNDECODABLE as e:
        raise BadRequest(f"the body is not valid JSON: {e}") from e
    if len(values) > MOST_MEMBERS:
        raise BadRequest(f"the body has more than {MOST_MEMBERS} members")
    found: dict[str, tuple[int, int]] = {}
    key = ""
    at = body.index(b"{") + 1
    while match := _MEMBER.match(body, at):
        key = _text(match[1])
        value = values[key]
        start = match.end()
        at = start + len(memoryview(value))
        # The decoder keeps a key's last value. If another stands here, the key comes twice; if it begins alike
        # (12 and 1), the jump ends inside it, where neither a member nor the end can follow.
        if key in found or not body.startswith(value, start):
            raise _twice(key)
        found[key] = start, at
    if not _END.fullmatch(body, at):
        raise _twice(key)
    return found


def _text(literal: bytes) -> str:
    if b"\\" in literal:  # "mod\u0065l" is "model"
        return msgspec.json.decode(literal, type=str)
    return literal[1:-1].decode()


def _twice(key: str) -> BadRequest:
    return BadRequest(f"the body has the member {key!r} more than once", param=key)
