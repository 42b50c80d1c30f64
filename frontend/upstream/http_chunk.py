"""Recognises what a streaming engine writes for each token: exactly one chunk of HTTP's chunked coding.

Such a chunk can go to a client as it came, past both the parser and our own framing. Anything else (several chunks, a
part of one, the last one, extensions) is the parser's.
"""

from __future__ import annotations

import re
from typing import Final

_SIZE: Final = re.compile(rb"[0-9a-fA-F]{1,7}")
_MOST: Final = 4096
_sizes: Final[dict[bytes, int]] = {}
"""Size lines that were read before: tokens are alike."""


def chunk_size(data: bytes) -> int:
    """How many bytes the chunk has, if `data` is exactly one that is not empty; else 0."""
    at = data.find(b"\r\n", 0, 9)
    line = data[:at]
    size = _sizes.get(line)
    if size is None:
        if at < 0 or _SIZE.fullmatch(line) is None:
            return 0
        size = int(line, 16)
        if len(_sizes) < _MOST:
            _sizes[line] = size
    return size if at + size + 4 == len(data) and data.endswith(b"\r\n") else 0
