"""What native engines say of their errors."""

from __future__ import annotations

import msgspec

from broker.errors import UNDECODABLE


class _Error(msgspec.Struct):
    message: str


class _Answer(msgspec.Struct):
    error: _Error | str


def shown(data: bytes) -> str:
    """The engine's words: of an error in OpenAI's form its message, so that no JSON is nested in ours."""
    try:
        error = msgspec.json.decode(data, type=_Answer).error
    except UNDECODABLE:
        return data[:200].decode("utf-8", "replace")
    return (error if isinstance(error, str) else error.message)[:200]
