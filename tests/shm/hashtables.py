"""Small tables of keys to sets, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shm.hashtable import Found, TableReader, blocks
from shm.segment import Layout, Segment

MEMBERS = 70
"""More than a word of a bitmap holds."""
FOREVER = 2**62
ARRAYS = ("_sequence", "_keys", "_members", "_uses", "_pool")
"""Of a reader: its views of the segment's blocks."""

Vector = NDArray[np.int64]


_made: dict[Path, Segment] = {}


def segment(path: Path, capacity: int = 1024, pool: int = 64, members: int = MEMBERS) -> Segment:
    """A new one. What was made at this path before is closed: hundreds of examples must not hold hundreds of files."""
    if path in _made:
        _made.pop(path).close()
    path.unlink(missing_ok=True)
    made = _made[path] = Segment.create(path, Layout("table", 1, blocks(capacity, members, pool)))
    return made


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Segment]:
    yield segment(tmp_path / "table")
    _made.pop(tmp_path / "table").close()


def keys(*numbers: int) -> Vector:
    return np.array(numbers, dtype=np.int64)


def look(reader: TableReader, key: int) -> set[int] | None:
    found = reader.find(keys(key))
    return members(found) if len(found.at) else None


def members(found: Found) -> set[int]:
    """All that are in the set of any of the keys found."""
    return set(found.reach.nonzero()[0].tolist())


def reach(found: Found) -> dict[int, int]:
    return {member: int(found.reach[member]) for member in members(found)}
