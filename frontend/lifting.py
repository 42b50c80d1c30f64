"""Bodies whose long texts meet no parser.

Of a chat with a prompt of 32 KiB the parser's way through that one string takes most of the time: 6 us, where memory
takes less than one. So long strings are taken out of the body first (`_lift.c`, where it is compiled), the rest is
parsed, and they are put back into what that gave: only as the content of a message or as the prompt, and only if that
is all of them. In every other case, errors included, the body is parsed as it came.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

import msgspec

from broker.errors import UNDECODABLE
from shm.compiled import is_wanted

lift: Callable[[bytes, int], tuple[bytes, list[str]] | None] | None = None
"""None: it is not compiled, or not wanted."""
if is_wanted():
    with contextlib.suppress(ImportError):
        from frontend import _lift

        lift = _lift.lift

LONG: Final = 2048
"""Bytes of a string from which on it pays."""
_MARK: Final = "\0"


def decode_chat(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    """What the decoder makes of the body: an object with `messages`, which is None or a list of objects with `content`,
    and `prompt`. Raises what the decoder raises."""
    if len(data) >= LONG and lift is not None:
        lifted = lift(data, LONG)
        if lifted is not None:
            chat = _put_back(decoder, lifted[0], lifted[1])
            if chat is not None:
                return chat
    return decoder.decode(data)


def _put_back(decoder: msgspec.json.Decoder[Any], data: bytes, texts: list[str]) -> Any:
    try:
        chat = decoder.decode(data)
    except UNDECODABLE:
        return None
    left = len(texts)
    if chat.messages is not None:
        for message in chat.messages:
            content = message.content
            if isinstance(content, str) and content.startswith(_MARK):
                message.content = texts[int(content[1:])]
                left -= 1
    prompt = chat.prompt
    if isinstance(prompt, str) and prompt.startswith(_MARK):
        chat.prompt = texts[int(prompt[1:])]
        left -= 1
    return chat if left == 0 else None
