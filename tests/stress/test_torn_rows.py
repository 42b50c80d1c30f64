"""Torn rows: one process writes rows as fast as it can, another copies them.

Every write puts one rising number into all columns of a row, and into every byte of its blob.
Allowed: a row as some write left it; the row's previous copy; a blob not read (None).
Forbidden: columns of two writes in one row, bytes of two writes in one blob, a row that goes back in time, a reader
that never sees anything new.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from shm.segment import Block, Layout, Segment
from shm.seqlock import RowReader, RowWriter
from tests.support.children import child
from tests.support.twins import twin
from tests.support.waiting import until

__all__ = ["twin"]

COLUMNS, SLOTS, BLOB = 16, 8, 1024
LAYOUT = Layout(
    "rows",
    1,
    [
        Block("cells", (3,), labels=("VERSION", "USED", "STOP")),
        Block("sequence", (SLOTS,)),
        Block("values", (COLUMNS, SLOTS)),
        Block("blobs", (SLOTS, BLOB), "B"),
    ],
)


class UnmarkedWriter(RowWriter):
    """The writer's protection removed: the sequence moves, but after the row."""

    def write(self, slot, changes, also=None):  # type: ignore[no-untyped-def]  # as the real one
        self._used[0] = max(self._used[0], slot + 1)
        for column, value in changes.items():
            self._values[column * self._slots + slot] = value
        if also is not None:
            also()
        self._sequence[slot] += 2
        self._version[0] += 1


class UncheckedReader(RowReader):
    """The reader's protection removed: what was copied is believed."""

    def __init__(self, sequence, values, *cells):  # type: ignore[no-untyped-def]  # as the real one
        super().__init__(sequence, values, *cells)
        self._shared = values

    def refresh(self) -> bool:
        self.values[:] = self._shared
        return True

    def guarded(self, slot, read):  # type: ignore[no-untyped-def]  # as the real one
        return read()


def _cells(segment: Segment) -> tuple[memoryview, memoryview]:
    cells = segment.cells("cells")
    return cells[:1], cells[1:2]


def _write(path: Path, kind: type[RowWriter]) -> None:
    segment = Segment.attach(path, LAYOUT, writable=True)
    stop, blobs = segment.cells("cells")[2:], segment.bytes("blobs")
    writer = kind(segment.cells("sequence"), segment.cells("values"), *_cells(segment))
    for number in count(1):
        slot = number % SLOTS

        def blob(slot: int = slot, number: int = number) -> None:
            half = BLOB // 2
            content = bytes([number % 256]) * half
            blobs[slot * BLOB : slot * BLOB + half] = content
            blobs[slot * BLOB + half : (slot + 1) * BLOB] = content

        writer.write(slot, dict.fromkeys(range(COLUMNS), number), blob)
        if stop[0]:
            return


def _watch(reader: RowReader, blobs: memoryview) -> Iterator[str]:
    """Looks for ever; yields what is forbidden, or "" after a look without a finding."""
    last = np.zeros(SLOTS, dtype=np.int64)
    for number in count():
        reader.refresh()
        low, high = reader.values.min(axis=0), reader.values.max(axis=0)
        if (low != high).any():
            yield f"a torn row: {reader.values[:, np.flatnonzero(low != high)[0]].tolist()}"
            continue
        if (low < last).any():
            yield f"back in time: {last} {low}"
        last = low
        slot = number % SLOTS
        found = reader.guarded(slot, lambda slot=slot: bytes(blobs[slot * BLOB : (slot + 1) * BLOB]))
        yield "" if found is None or len(set(found)) == 1 else "a torn blob"


def _run(path: Path, writer: type[RowWriter], reader: type[RowReader], seconds: float, enough: int) -> list[str]:
    """What was found within `seconds`; stops early once `enough` was found."""
    Segment.create(path, LAYOUT).close()
    found = []
    with Segment.attach(path, LAYOUT, writable=True) as segment, child(_write, path, writer) as process:
        until(lambda: segment.cells("cells")[0] > 100, "the writer writes")
        rows = reader(segment.array("sequence"), segment.array("values"), *_cells(segment))
        deadline = time.monotonic() + seconds
        for finding in _watch(rows, segment.bytes("blobs")):
            if finding:
                found.append(finding)
            if len(found) >= enough or time.monotonic() > deadline:
                break
        assert rows.values.max() > 100, "nothing new was ever seen"
        segment.cells("cells")[2] = 1
        process.join()
    return found


@pytest.mark.parametrize("seconds", [0.5, pytest.param(20, marks=pytest.mark.stress)])
def test_no_torn_row_is_ever_accepted(tmp_path: Path, seconds: float) -> None:
    assert _run(tmp_path / "s", RowWriter, RowReader, seconds, 1) == []


@pytest.mark.parametrize("scale", [1, pytest.param(100, marks=pytest.mark.stress)])
@pytest.mark.parametrize(
    ("writer", "reader"), [(UnmarkedWriter, RowReader), (RowWriter, UncheckedReader)], ids=["writer", "reader"]
)
def test_without_either_half_of_the_protection_torn_rows_are_found(
    tmp_path: Path, writer: type[RowWriter], reader: type[RowReader], scale: int
) -> None:
    assert len(_run(tmp_path / "s", writer, reader, 60, scale)) == scale
