"""What the load generator sends: the same bytes to every router, in the same order, in every run."""

from __future__ import annotations

import json
import random
from pathlib import Path

MODEL = "mock"
TEXT = "please summarise the following passage about routers and engines in plain words "

PREFIXES = 8
PREFIX_BYTES = 24 * 1024
PROMPTS = 512
PROMPT_BYTES = 32 * 1024
SEED = 20


def one(size: int, *, stream: bool) -> list[bytes]:
    """A single body of `size` bytes."""
    return [_body(TEXT * (size // len(TEXT) + 1), size, stream)]


def sharing_prefixes(*, stream: bool = False) -> list[bytes]:
    """512 different bodies of 32 KiB: 8 prefixes of 24 KiB, each shared by 64 of them, in a random but fixed order."""
    rng = random.Random(SEED)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4096)]

    def text(size: int) -> str:
        words = " ".join(rng.choices(vocabulary, k=size // 4))
        return words[:size]

    prefixes = [text(PREFIX_BYTES) for _ in range(PREFIXES)]
    bodies = [_body(prefixes[i % PREFIXES] + text(PROMPT_BYTES), PROMPT_BYTES, stream) for i in range(PROMPTS)]
    rng.shuffle(bodies)
    return bodies


def save(bodies: list[bytes], path: Path) -> Path:
    """One body a line, as the load generator reads them."""
    path.write_bytes(b"".join(body + b"\n" for body in bodies))
    return path


def _body(text: str, size: int, stream: bool) -> bytes:
    def encode(content: str) -> bytes:
        return json.dumps(
            {
                "model": MODEL,
                "messages": [
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": content},
                ],
                "max_tokens": 64,
                "temperature": 0.7,
                "stream": stream,
            }
        ).encode()

    return encode(text[: size - len(encode(""))])
