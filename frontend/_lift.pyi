"""Long strings of JSON, past the parser; `_lift.c` has the reasons."""

def lift(data: bytes, least: int, /) -> tuple[bytes, list[str]] | None:
    r"""The JSON text with a mark in the place of each string of at least `least` bytes (32 at the least): a NUL and the
    string's place in the list beside it. No other string begins like a mark.

    None: there is none, or something is not beyond doubt. A string with `\u` in it stays where it is."""
