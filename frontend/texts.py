"""The text of a prompt, of an input or of messages, whatever the shape that they have in a body.

Compiled, unlike the bodies themselves (`frontend/body.py`), which are msgspec's.
"""

from __future__ import annotations

from typing import Any, Final

_DEEPEST: Final = 8
"""Lists and objects around a text. No known shape has as many; what has more than Python's stack would end it."""


def collect(value: Any, texts: list[str], depth: int = _DEEPEST) -> int:
    """Appends the texts of a prompt, of an input or of messages; returns how many token ids there were.

    A prompt or input is a text, token ids, or a list of either; a message has a text or a list of parts.
    """
    if isinstance(value, str):
        texts.append(value)
        return 0
    if not depth:
        return 0
    if isinstance(value, list):
        if value and type(value[0]) is int:
            return len(value)
        ids = 0
        for item in value:
            if not (item is None or isinstance(item, (int, float))):
                ids += collect(item, texts, depth - 1)
        return ids
    if isinstance(value, dict):
        content = value.get("content")
        return collect(value.get("text") if content is None else content, texts, depth - 1)
    return 0


def collect_chat(messages: list[Any], texts: list[str]) -> int:
    """As `collect`, of messages that are objects with a `content` and a `text`."""
    ids = 0
    for message in messages:
        content = message.content
        if type(content) is str:
            texts.append(content)
        else:
            ids += collect(message.text if content is None else content, texts)
    return ids
