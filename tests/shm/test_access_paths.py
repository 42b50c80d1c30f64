"""Which ways of touching a shared cell move all eight bytes at once. A contract of CPython and numpy, tried for real:
a writer in another process flips cells between two values that differ in every byte.

Allowed to be seen: one of the two. Forbidden: anything else. `struct` is tried too, and must be caught: it zeroes the
bytes before it fills them, which is why it is banned from shared cells.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from shm.segment import Block, Layout, Segment
from tests.support.children import child

CELLS = 64
LAYOUT = Layout("flip", 1, [Block("stop", (1,)), Block("cells", (CELLS,)), Block("raw", (CELLS * 8,), "B")])
ONE, OTHER = 0x1111111111111111, -0x1234567876543211
SECONDS = 0.1


def _write(path: Path, way: str) -> None:
    segment = Segment.attach(path, LAYOUT, writable=True)
    stop, cells, array, raw = (
        segment.cells("stop"),
        segment.cells("cells"),
        segment.array("cells"),
        segment.bytes("raw"),
    )
    whole = {value: np.full(CELLS, value, dtype=np.int64) for value in (ONE, OTHER)}
    while not stop[0]:
        for value in (ONE, OTHER):
            if way == "memoryview item":
                for index in range(CELLS):
                    cells[index] = value
            elif way == "numpy item":
                for index in range(CELLS):
                    array[index] = value
            elif way == "numpy column":
                array[:] = whole[value]
            elif way == "numpy add":
                array += value - array
            elif way == "struct":
                for index in range(CELLS):
                    struct.pack_into("q", raw, index * 8, value)


READERS: dict[str, Callable[[Segment], Callable[[], set[int]]]] = {
    "memoryview item": lambda s: (lambda c: lambda: {c[i] for i in range(CELLS)})(s.cells("cells")),
    "memoryview tolist": lambda s: (lambda c: lambda: set(c.tolist()))(s.cells("cells")),
    "numpy item": lambda s: (lambda a: lambda: {int(a[i]) for i in range(CELLS)})(s.array("cells")),
    "numpy copy": lambda s: (lambda a: lambda: set(a.copy().tolist()))(s.array("cells")),
    "numpy copy of every second": lambda s: (lambda a: lambda: set(a[1::2].copy().tolist()))(s.array("cells")),
    "numpy take": lambda s: (lambda a, i: lambda: set(a[i].tolist()))(s.array("cells"), np.arange(3, CELLS)),
    "numpy reduce": lambda s: (lambda a: lambda: set(np.add.reduce(a[:, None], 1).tolist()))(s.array("cells")),
}


def _try(path: Path, way: str, reads: Iterable[Callable[[], set[int]]], enough: Callable[[set[int]], bool]) -> set[int]:
    """Everything that was seen: each way of reading for SECONDS, and until it has seen `enough`."""
    everything: set[int] = set()
    with Segment.attach(path, LAYOUT, writable=True) as segment, child(_write, path, way) as writer:
        for read in reads:
            seen: set[int] = set()
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline or not enough(seen):
                seen |= read()
                assert time.monotonic() < deadline + 30, f"saw {seen}"
            everything |= seen
        segment.cells("stop")[0] = 1
        writer.join()
    return everything


@pytest.mark.parametrize("write", ["memoryview item", "numpy item", "numpy column", "numpy add"])
def test_a_cell_is_seen_before_or_after_a_store_never_in_between(tmp_path: Path, write: str) -> None:
    with Segment.create(tmp_path / "s", LAYOUT) as segment:
        segment.array("cells")[:] = ONE
        reads = [make(segment) for make in READERS.values()]
        assert _try(tmp_path / "s", write, reads, {ONE, OTHER}.issubset) == {ONE, OTHER}


def test_struct_is_caught(tmp_path: Path) -> None:
    """Without the ban: (1) a frontend packs a counter, (2) for an instant it is 0, (3) others see nothing in flight."""
    with Segment.create(tmp_path / "s", LAYOUT) as segment:
        raw = segment.bytes("raw").cast("q")
        for index in range(CELLS):
            raw[index] = ONE
        seen = _try(tmp_path / "s", "struct", [lambda: set(raw.tolist())], lambda seen: bool(seen - {ONE, OTHER}))
        assert seen - {ONE, OTHER}
