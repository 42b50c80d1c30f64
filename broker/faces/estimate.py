"""How many tokens a prompt has, by its bytes. Compiled: every request asks."""

from __future__ import annotations

from typing import Final

from broker.faces.base import Estimate

BYTES_PER_TOKEN: Final = 4
"""The estimate for text; token-id lists are counted exactly."""


def estimate(texts: list[str], ids: int) -> Estimate:
    if len(texts) == 1:
        text = texts[0]
        size = _utf8_bytes(text)
    else:
        text = "\n".join(texts)
        size = _utf8_bytes(text) - max(0, len(texts) - 1)
    return text, ids - (-size // BYTES_PER_TOKEN)


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
