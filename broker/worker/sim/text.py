"""What a simulated engine says: words drawn from the prompt, the instance and the transfer data.

A wrong path, instance, prompt or transfer object therefore cannot look right, and a test that knows the four computes
the exact answer: `Words(prompt.digest, name, transfer).text(n)`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any, Literal

from broker.worker.request import EngineError

CONSONANTS = "bcdfghjklmnprstv"
VOWELS = ("a", "e", "i", "o", "u", "ai", "au", "ea", "ei", "eo", "ia", "ie", "io", "oa", "oi", "ou")
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS]
"""256 of them: one per byte."""

Kind = Literal["chat", "completion", "embedding"]

OWN_LENGTH = range(8, 65)
"""Tokens of an answer that nothing else limits."""


class Prompt:
    """A prompt in the two forms that matter: a digest of it, and its tokens."""

    def __init__(self, kind: Kind, content: object, tokens: tuple[int, ...]) -> None:
        self.kind = kind
        canonical = json.dumps([kind, content], sort_keys=True).encode()  # orjson refuses what is beyond 64 bits
        self.digest = hashlib.blake2b(canonical, digest_size=16).digest()
        self.tokens = tokens


class Words:
    """The endless text of one answer."""

    def __init__(self, digest: bytes, name: str, transfer: bytes = b"") -> None:
        source = hashlib.shake_256()
        for part in (digest, name.encode(), transfer):
            source.update(len(part).to_bytes(8, "big") + part)
        self._source = source
        self._drawn = source.digest(256)

    @property
    def own_length(self) -> int:
        """Where it would stop by itself."""
        return OWN_LENGTH[int.from_bytes(self._drawn[:4], "big") % len(OWN_LENGTH)]

    def delta(self, i: int) -> str:
        """Token i as text."""
        while 2 * i + 6 > len(self._drawn):
            self._drawn = self._source.digest(2 * len(self._drawn))  # SHAKE: a longer digest continues a shorter one
        a, b = self._drawn[2 * i + 4 : 2 * i + 6]
        word = SYLLABLES[a] + SYLLABLES[b]
        return f" {word}" if i else word

    def text(self, tokens: int) -> str:
        return "".join(self.delta(i) for i in range(tokens))


def prompt_of(kind: Kind, body: Mapping[str, Any]) -> Prompt:
    """The prompt in a request's body. Raises `EngineError` 400 as engines do for what they cannot use."""
    if kind == "chat":
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise EngineError(400, "messages must be a non-empty list of objects")
        content = {"messages": messages, "tools": body.get("tools")}
        return Prompt(kind, content, tokens_of("\n".join(_render(m) for m in messages)))
    key = "prompt" if kind == "completion" else "input"
    prompt = body.get(key)
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return Prompt(kind, prompt, tokens_of(prompt))
    if isinstance(prompt, list) and prompt and all(type(t) is int and 0 <= t < 2**32 for t in prompt):
        return Prompt(kind, prompt, tuple(prompt))
    if kind == "embedding" and isinstance(prompt, list) and prompt and all(isinstance(t, str) and t for t in prompt):
        return Prompt(kind, prompt, tokens_of("\n".join(prompt)))
    raise EngineError(400, f"{key} must be one string or one list of token ids")


def tokens_of(text: str) -> tuple[int, ...]:
    """Four characters are a token."""
    return tuple(zlib.crc32(text[i : i + 4].encode(errors="surrogatepass")) for i in range(0, len(text), 4))


def _render(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        text = content
    else:
        text = json.dumps(content, sort_keys=True)
    return f"{message.get('role')}: {text}"
