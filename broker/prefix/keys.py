"""The keys of a prompt's blocks: one 64-bit hash per block, of all that is in front of its end.

    a block's characters or token ids, as 64-bit words w, cut into low and high halves
        h[k]   = sum over the words of A[i] w[i] + B[i] (w[i] >> 32)       multilinear hashing of 32-bit letters
        key[k] = mixed(start + P[0] h[0] + ... + P[k] h[k])                 the same over blocks, so order counts

All of it modulo 2^64, in a dozen numpy calls however long the prompt is. A, B and P are fixed random odd numbers. For
letters of 32 bits two texts that differ collide with a probability of at most 2^-33 over the choice of the
constants, and about 2^-60 when they differ in more than a few of the highest bits. Whoever works for it can make texts
that collide; that misleads the choice of an instance and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from shm.compiled import is_wanted

compiled: ModuleType | None = None
"""The compiled twins; None: there are none, or they are not wanted."""
if is_wanted():
    with contextlib.suppress(ImportError):
        from broker.prefix import _keys

        compiled = _keys

BLOCKS = 1024
"""Blocks of one prompt that count, if nobody says otherwise; the rest of it is as if it were new."""

Vector = NDArray[np.int64]
Words = NDArray[np.uint64]
Kind = Literal["text", "token"]

_INT64: Final = np.dtype(np.int64)
_S32 = np.uint64(32)
_NEVER_ZERO = np.uint64(1 << 63)
_ALL = (1 << 64) - 1


@lru_cache(maxsize=16)
def _constants(name: str, count: int) -> Words:
    """Odd numbers that are the same in every process; of more than `count`, the first ones."""
    data = hashlib.shake_128(f"penstock prefix {name}".encode()).digest(8 * count)
    return np.frombuffer(data, dtype="<u8").astype(np.uint64) | np.uint64(1)


@lru_cache(maxsize=16)
def _tables(block: int, count: int) -> tuple[bytes, bytes, bytes, bytes, bytes]:
    """The constants of so many blocks of that size, for the compiled twin: of places, of narrow words, of wide ones."""
    narrow, wide = -(-block // 8), -(-block // 2)
    return (
        _constants("place", count).tobytes(),
        _constants("narrow", narrow).tobytes(),
        _constants("narrow high", narrow).tobytes(),
        _constants("wide", wide).tobytes(),
        _constants("wide high", wide).tobytes(),
    )


@lru_cache(maxsize=1024)
def namespace(model: str, block: int, kind: Kind) -> int:
    """Where the chains of a model begin.

    Keys of different namespaces are equal only by chance, so text blocks, token blocks and an engine's own blocks of
    another size live side by side in one table.
    """
    digest = hashlib.blake2b(f"{kind}/{block}/{model}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def text_keys(text: str, block: int, start: int, limit: int = BLOCKS) -> Vector:
    """The keys of the full blocks of `block` characters (code points), at most `limit`.

    A block hashes alike whatever else is in its prompt: a prompt in ASCII and one that goes on in Chinese share the
    blocks they share.
    """
    count = min(len(text) // block, limit)
    if compiled is None or not count:
        return _text_keys(text, block, start, count)
    keys = np.empty(count, _INT64)
    places, narrow, narrow_high, wide, wide_high = _tables(block, _round(count))
    compiled.text_keys(block, start, places, keys, text, narrow, narrow_high, wide, wide_high)
    return keys


def _text_keys(text: str, block: int, start: int, count: int) -> Vector:
    if not count:
        return np.empty(0, dtype=np.int64)
    text = text[: count * block]
    if text.isascii():
        return _chain(_narrow(np.frombuffer(text.encode("ascii"), dtype=np.uint8).reshape(count, block)), start)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).reshape(count, block)
    hashes = _wide(points)
    plain = np.flatnonzero((points < 128).all(axis=1))
    hashes[plain] = _narrow(points[plain].astype(np.uint8))
    return _chain(hashes, start)


def token_keys(tokens: Sequence[int] | Vector, block: int, start: int, limit: int = BLOCKS) -> Vector:
    """The keys of the full blocks of `block` token ids, at most `limit`."""
    count = min(len(tokens) // block, limit)
    if not count:
        return np.empty(0, dtype=np.int64)
    ids = np.asarray(tokens[: count * block], dtype=np.int64)
    if compiled is None:
        return _chain(_wide(ids.astype(np.uint32).reshape(count, block)), start)
    keys = np.empty(count, _INT64)
    places, _, _, wide, wide_high = _tables(block, _round(count))
    compiled.token_keys(block, start, places, keys, ids, wide, wide_high)
    return keys


def alike(keys: Vector, others: Vector) -> int:
    """How many leading keys are equal."""
    if compiled is not None:
        count: int = compiled.alike(keys, others)
        return count
    shared = min(len(keys), len(others))
    apart = (keys[:shared] != others[:shared]).nonzero()[0]
    return int(apart[0]) if len(apart) else shared


def _narrow(rows: NDArray[np.uint8]) -> Words:
    """A hash of each row of bytes."""
    return _hashed(_packed(rows, 8), "narrow")


def _wide(rows: NDArray[np.uint32]) -> Words:
    """A hash of each row of 32-bit numbers."""
    return _hashed(_packed(rows, 2), "wide")


def _packed(rows: NDArray[np.uint8] | NDArray[np.uint32], per_word: int) -> Words:
    count, width = rows.shape
    rest = -width % per_word
    if rest:
        padded = np.zeros((count, width + rest), dtype=rows.dtype)
        padded[:, :width] = rows
        rows = padded
    return np.ascontiguousarray(rows).view(np.uint64)


def _hashed(words: Words, name: str) -> Words:
    """A weighted sum of the 32-bit letters of each row.

    Words of 64 bits alone would not do: a multiplication carries upwards only, so of differences in the highest bytes
    of two words only their lowest bits would be told apart. As letters the high half counts like the low one.

    Measured for 512 blocks of 64 bytes, with `_chain`: 12 us; one xxh3 per block, from Python, 15.
    """
    width = words.shape[1]
    hashes: Words = np.vecdot(words, _constants(name, width))
    hashes += np.vecdot(words >> _S32, _constants(f"{name} high", width))
    return hashes


def _round(count: int) -> int:
    """For how many places there are constants: few different numbers, so that they are kept."""
    return -(-count // BLOCKS) * BLOCKS


def _chain(hashes: Words, start: int) -> Vector:
    """Key k: the sum of the first k blocks' hashes, each weighted by its place, from `start` on.

    At last the high half is laid over the low one, which alone chooses the bucket and is of lesser quality.
    """
    count = len(hashes)
    hashes *= _constants("place", _round(count))[:count]
    hashes[0] = (hashes.item(0) + start) & _ALL  # as integers: it may wrap around, and takes half as long
    np.add.accumulate(hashes, out=hashes)
    hashes ^= hashes >> _S32
    hashes |= _NEVER_ZERO  # 0 is the table's word for nothing
    return hashes.view(np.int64)
