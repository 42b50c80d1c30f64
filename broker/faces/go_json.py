"""What `encoding/json` says of text that is no JSON: the words that clients of a Go program know.

A scanner of one pass, as the original is: it stops at the first byte that cannot follow what came before. Text that is
merely of another type than wanted is no matter of its.
"""

from __future__ import annotations

import re

MOST_BYTES = 64 * 1024
"""Longer texts are not scanned: this is Python, and everybody else waits."""
DEEPEST = 10_000

_SPACE = re.compile(rb"[ \t\r\n]*")
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]*')
_DIGITS = re.compile(rb"[0-9]*")
_HEX = frozenset(b"0123456789abcdefABCDEF")
_ESCAPES = frozenset(b'bfnrt\\/"')
_LITERALS = {ord("t"): b"true", ord("f"): b"false", ord("n"): b"null"}
_NAMED = {7: r"\a", 8: r"\b", 9: r"\t", 10: r"\n", 11: r"\v", 12: r"\f", 13: r"\r", 39: r"\'", 92: r"\\"}


class Misplaced(Exception):
    """The message is the original's."""


def syntax_error(data: bytes) -> str | None:
    """None = the text is JSON."""
    try:
        _Scanner(data).scan()
    except Misplaced as e:
        return str(e)
    return None


def shown(byte: int) -> str:
    """A byte as Go quotes it: as if it were a character of Latin-1."""
    if byte in _NAMED:
        return f"'{_NAMED[byte]}'"
    character = chr(byte)
    if character.isprintable():
        return f"'{character}'"
    return f"'\\x{byte:02x}'" if byte < 0x80 else f"'\\u{byte:04x}'"


class _Scanner:
    """At the end of the text Go looks at one more byte, a space: what may end there, ends there."""

    def __init__(self, data: bytes) -> None:
        self._data = data + b" "
        self._end = len(data)
        self._at = 0

    def scan(self) -> None:
        """Raises `Misplaced`."""
        open_: list[int] = []  # the brackets that are open
        while True:
            self._value(open_)
            if not self._close(open_):
                return

    def _value(self, open_: list[int]) -> None:
        """Up to the end of the next value that holds no other, or to the end of an empty one."""
        while True:
            byte = self._next()
            if byte in b"{[":
                open_.append(byte)
                if len(open_) > DEEPEST:
                    raise self._misplaced("exceeded max depth")
                self._at += 1
                if byte == ord("{"):
                    if self._next() == ord("}"):
                        return
                    self._key()
                elif self._next() == ord("]"):
                    return
                continue
            self._scalar(byte)
            return

    def _close(self, open_: list[int]) -> bool:
        """From the end of a value to where the next begins; False: that was the whole text."""
        while open_:
            byte = self._next()
            in_object = open_[-1] == ord("{")
            if byte == ord("}" if in_object else "]"):
                self._at += 1
                open_.pop()
                continue
            if byte != ord(","):
                raise self._misplaced("after object key:value pair" if in_object else "after array element")
            self._at += 1
            if in_object:
                self._key()
            return True
        self._skip(_SPACE)
        if self._at < self._end:
            raise self._misplaced("after top-level value")
        return False

    def _key(self) -> None:
        if self._next() != ord('"'):
            raise self._misplaced("looking for beginning of object key string")
        self._string()
        if self._next() != ord(":"):
            raise self._misplaced("after object key")
        self._at += 1

    def _scalar(self, byte: int) -> None:
        if byte == ord('"'):
            self._string()
        elif byte in _LITERALS:
            word = _LITERALS[byte]
            for expected in word[1:]:
                self._at += 1
                if self._byte() != expected:
                    raise self._misplaced(f"in literal {word.decode()} (expecting '{chr(expected)}')")
            self._at += 1
        elif byte == ord("-") or (chr(byte).isascii() and chr(byte).isdigit()):
            self._number(byte)
        else:
            raise self._misplaced("looking for beginning of value")

    def _string(self) -> None:
        self._at += 1
        while True:
            self._skip(_PLAIN)
            if self._at >= self._end:
                raise Misplaced(_ENDED)
            byte = self._byte()
            self._at += 1
            if byte == ord('"'):
                return
            if byte < 0x20:
                self._at -= 1
                raise self._misplaced("in string literal")
            if self._byte() not in _ESCAPES and self._byte() != ord("u"):
                raise self._misplaced("in string escape code")
            digits = 4 if self._byte() == ord("u") else 0
            self._at += 1
            for _ in range(digits):
                if self._byte() not in _HEX:
                    raise self._misplaced("in \\u hexadecimal character escape")
                self._at += 1

    def _number(self, byte: int) -> None:
        if byte == ord("-"):
            self._at += 1
        if self._byte() == ord("0"):
            self._at += 1
        else:
            self._digits("in numeric literal")
        if self._byte() == ord("."):
            self._at += 1
            self._digits("after decimal point in numeric literal")
        if self._byte() in b"eE":
            self._at += 1
            if self._byte() in b"+-":
                self._at += 1
            self._digits("in exponent of numeric literal")

    def _digits(self, where: str) -> None:
        """One at least."""
        start = self._at
        self._skip(_DIGITS)
        if self._at == start:
            raise self._misplaced(where)

    def _next(self) -> int:
        """The next byte that is no space."""
        self._skip(_SPACE)
        if self._at >= self._end:
            raise Misplaced(_ENDED)
        return self._byte()

    def _byte(self) -> int:
        return self._data[self._at]

    def _skip(self, what: re.Pattern[bytes]) -> None:
        found = what.match(self._data, self._at)
        assert found is not None  # every one of them matches nothing, too
        self._at = min(found.end(), self._end)

    def _misplaced(self, where: str) -> Misplaced:
        return Misplaced(f"invalid character {shown(self._byte())} {where}")


_ENDED = "unexpected end of JSON input"
