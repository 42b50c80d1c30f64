"""The compiled twins of what `keys.py` does for every prompt. Constants are bytes of native 64-bit words; who takes any
raises ValueError when one has too few."""

from shm.hashtable.layout import Vector

def text_keys(
    block: int,
    start: int,
    places: bytes,
    keys: Vector,
    text: str,
    narrow: bytes,
    narrow_high: bytes,
    wide: bytes,
    wide_high: bytes,
    /,
) -> None:
    """Fills `keys` with those of as many blocks of the text; it must have them."""

def token_keys(
    block: int, start: int, places: bytes, keys: Vector, ids: Vector, wide: bytes, wide_high: bytes, /
) -> None:
    """The same for 64-bit token ids."""

def alike(keys: Vector, others: Vector, /) -> int:
    """How many leading keys are equal."""
