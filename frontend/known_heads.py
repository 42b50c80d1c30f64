"""Heads of HTTP messages that were read before: one look-up instead of a parser and a call for each header.

Who talks to us says the same again and again: from one request of a client to the next, or from one answer of an
engine to the next, only the length of the body differs (and an answer's date, once a second). So a head is known by its
bytes without the digits of its Content-Length, and what was once made of it is good for all that are equal.

Nothing is parsed here. What a head means was found out by the parser when it was seen first, with every check that
there is; a head is known only if it is that one to the last byte, digits apart, and digits change no other byte's
meaning. Whatever is different in any way, or is not exactly one message with its whole body, is not known, and goes
the long way.

Bought: about half of what a small request cost (docs/performance.md, section 6).
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

Head = TypeVar("Head")

MOST = 1024
"""Heads kept; the one learned first goes first. A client whose every head is new (a name or a trace of its own for each
request) learns for nothing, and bounds this."""
MOST_BYTES = 4096
"""Of one head."""

_END: Final = b"\r\n\r\n"
_LENGTH: Final = b"\r\nContent-Length: "
_LOWER_LENGTH: Final = b"\r\ncontent-length: "
_AFTER: Final = len(_LENGTH)
_MOST_DIGITS: Final = 18
_ZERO: Final = 0x30
_NINE: Final = 9


class KnownHeads(Generic[Head]):
    """By their bytes. One for each kind of message; used on the loop's thread alone."""

    __slots__ = ("_known", "_last")

    def __init__(self) -> None:
        self._known: dict[bytes, Head] = {}
        self._last: tuple[bytes, bytes, Head] | None = None  # what was known last: up to the digits, behind them

    def __len__(self) -> int:
        return len(self._known)

    def whole(self, data: bytes) -> tuple[Head, bytes] | None:
        """What is known of the head, and the body, if `data` is exactly one message and its head is known."""
        if self._last is not None:
            front, behind, head = self._last
            if data.startswith(front):
                at = len(front)
                stop, size = _number(data, at)
                body = stop + len(behind)
                if data[stop:body] == behind:
                    return (head, data[body:]) if size == len(data) - body else None
        end = data.find(_END)
        at = _digits(data, end) if end > 0 else -1
        if at < 0:
            return None
        stop = data.find(b"\r", at)
        found = self._known.get(data[:at] + data[stop:end])
        if found is None:
            return None
        self._last = data[:at], data[stop : end + 4], found
        body = end + 4
        return (found, data[body:]) if _number(data, at) == (stop, len(data) - body) else None

    def learn(self, data: bytes, headers: int, head: Head) -> None:
        """The parser has read a message from the first byte of `data` on: so many headers, and the head means `head`.

        Whether it has seen the head where we see it is checked by the number of lines: a head with other line ends, or
        with lines that are folded, is not learned.
        """
        end = data.find(_END)
        if not 0 < end <= MOST_BYTES:
            return
        at = _digits(data, end)
        if at < 0 or data.count(b"\n", 0, end) != headers or data.count(b"\r", 0, end) != headers:
            return
        stop = data.find(b"\r", at)
        if data[at:stop].isdigit():
            key = data[:at] + data[stop:end]
            if len(self._known) >= MOST and key not in self._known:
                del self._known[next(iter(self._known))]
            self._known[key] = head


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Where the digits end that begin there, and what they say; -1: nothing, or too much. (By hand: compiled, that is a
    third of what `find` takes.)"""
    end, most, number = at, min(len(data), at + _MOST_DIGITS + 1), 0
    while end < most:
        digit = data[end] - _ZERO
        if not 0 <= digit <= _NINE:
            break
        number = number * 10 + digit
        end += 1
    return end, number if 0 < end - at <= _MOST_DIGITS else -1


def _digits(data: bytes, end: int) -> int:
    """Where the Content-Length's digits begin; -1: there is none."""
    at = data.find(_LENGTH, 0, end)
    if at < 0:
        at = data.find(_LOWER_LENGTH, 0, end)
    return at + _AFTER if at >= 0 else -1
