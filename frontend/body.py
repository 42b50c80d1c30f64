"""What of a request's body decides its way: parsed once, at the edge, and never re-encoded.

Only `model` and `stream` must have their types. Of everything else the text is taken where its shape is known
and ignored where it is not: whether a request makes sense is for the engine to say.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from broker.errors import UNDECODABLE, BadRequest

BYTES_PER_TOKEN = 4
"""The estimate for text; token-id lists are counted exactly."""


class Body(msgspec.Struct, gc=False):
    """The members that matter. Measured on 1 KiB and 32 KiB of chat: benchmarks/test_dispatch.py."""

    model: str | None = None
    stream: bool | None = None
    session_id: Any = None
    messages: Any = None
    prompt: Any = None
    input: Any = None

    def session(self) -> str | None:
        return str(self.session_id) if isinstance(self.session_id, str | int) and self.session_id != "" else None

    def text(self) -> tuple[str, int]:
        """The prompt's text, and its estimated tokens."""
        texts: list[str] = []
        ids = _collect(self.messages, texts) + _collect(self.prompt, texts) + _collect(self.input, texts)
        text = texts[0] if len(texts) == 1 else "\n".join(texts)
        size = sum(map(_utf8_bytes, texts))
        return text, ids - (-size // BYTES_PER_TOKEN)


_decoder = msgspec.json.Decoder(Body)


def parse(data: bytes) -> Body:
    """Raises `BadRequest` for what is no JSON object, or has a `model` or `stream` of the wrong type."""
    try:
        return _decoder.decode(data)
    except UNDECODABLE as e:
        return _parse_slowly(data, e)


def _parse_slowly(data: bytes, fast: Exception) -> Body:
    """What msgspec refuses once more with the parser that engines use, which takes lone surrogates and 1e999.

    A client that cuts a text within an emoji sends such a surrogate; every Python engine answers it.
    """
    try:
        tree = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise BadRequest(f"the body is not valid JSON: {fast}") from e
    if not isinstance(tree, dict):
        raise BadRequest("the body must be a JSON object")
    for name, kind, word in (("model", str, "string"), ("stream", bool, "boolean")):
        if not isinstance(tree.get(name), kind | None):
            raise BadRequest(f"{name!r} must be a {word}", param=name)
    return Body(**{name: tree.get(name) for name in Body.__struct_fields__})


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _collect(value: Any, texts: list[str]) -> int:
    """Appends the texts of a prompt, of an input or of messages; returns how many token ids there were.

    A prompt or input is a text, token ids, or a list of either; a message has a text or a list of parts.
    """
    if isinstance(value, str):
        texts.append(value)
        return 0
    if isinstance(value, list):
        if value and type(value[0]) is int:
            return len(value)
        return sum([_collect(item, texts) for item in value if not isinstance(item, int | float | None)])
    if isinstance(value, dict):
        content = value.get("content")
        return _collect(value.get("text") if content is None else content, texts)
    return 0


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
