"""Segments: what a layout promises, who may write, and what goes wrong with a sentence."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shm.segment import (
    PAGE,
    Block,
    Layout,
    Segment,
    SegmentError,
    SegmentMismatch,
    SegmentMissing,
    SegmentSpace,
)
from tests.support.children import child

LAYOUT = Layout(
    "example",
    3,
    [
        Block("cells", (3,), labels=("A", "B", "C")),
        Block("matrix", (5, 7)),
        Block("rows", (4, 2, 9), paged=True, labels=("UP", "DOWN"), labelled=1),
        Block("blobs", (7, 100), "B"),
    ],
)


@st.composite
def blocks(draw: st.DrawFn) -> list[Block]:
    count = draw(st.integers(1, 6))
    shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
    return [Block(f"b{i}", draw(shapes), draw(st.sampled_from(["q", "B"])), draw(st.booleans())) for i in range(count)]


@given(blocks())
def test_blocks_are_aligned_and_apart(found: list[Block]) -> None:
    layout = Layout("x", 1, found)
    end = len(layout.text)
    for block in found:
        start = layout.offset(block.name)
        assert start >= end
        assert start % (PAGE if block.paged else 64) == 0
        assert not block.paged or block.row_bytes % PAGE == 0
        end = start + block.size
    assert end <= layout.size
    assert layout.size % PAGE == 0


@given(blocks(), blocks())
def test_digests_are_equal_for_equal_layouts_only(one: list[Block], other: list[Block]) -> None:
    first, second = Layout("x", 1, one), Layout("x", 1, other)
    assert (first.digest == second.digest) == (one == other)
    assert Layout.from_text(first.text).digest == first.digest


def test_digest_is_the_same_in_a_process_with_other_hashes() -> None:
    code = "from shm.segment import *; print(Layout('x', 1, [Block('a', (3,), labels=('A', 'B', 'C'))]).digest)"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
    assert int(output) == Layout("x", 1, [Block("a", (3,), labels=("A", "B", "C"))]).digest


@pytest.mark.parametrize(
    "wrong", [[Block("a", ())], [Block("a", (0,))], [Block("a", (1,)), Block("a", (2,))]], ids=repr
)
def test_a_layout_without_cells_or_with_one_name_twice_is_refused(wrong: list[Block]) -> None:
    with pytest.raises(ValueError, match="'x'"):
        Layout("x", 1, wrong)


def test_what_is_written_is_read_elsewhere(tmp_path: Path) -> None:
    with Segment.create(tmp_path / "s", LAYOUT) as ours, Segment.attach(tmp_path / "s", LAYOUT) as theirs:
        assert not theirs.array("matrix").any()
        ours.array("matrix")[4, 6] = -5
        ours.cells("cells")[1] = 2**62
        ours.bytes("blobs")[600:603] = b"abc"
        assert theirs.array("matrix")[4, 6] == -5
        assert theirs.cells("matrix")[4 * 7 + 6] == -5
        assert theirs.array("cells").tolist() == [0, 2**62, 0]
        assert bytes(theirs.bytes("blobs")[600:603]) == b"abc"
    assert os.listdir(tmp_path) == ["s"]


def test_arrays_are_native_aligned_int64(tmp_path: Path) -> None:
    with Segment.create(tmp_path / "s", LAYOUT) as segment:
        for name in ("cells", "matrix", "rows"):
            array = segment.array(name)
            assert array.dtype == np.int64
            assert array.dtype.isnative
            assert array.ctypes.data % 64 == 0


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    Segment.create(tmp_path / "s", LAYOUT).close()
    with Segment.attach(tmp_path / "s", LAYOUT) as segment:
        with pytest.raises(ValueError, match="read-only"):
            segment.array("matrix")[0, 0] = 1
        with pytest.raises(TypeError, match="read-only"):
            segment.cells("cells")[0] = 1
        with pytest.raises(TypeError, match="read-only"):
            segment.bytes("blobs")[0] = 1
        with pytest.raises(TypeError, match="read-only"):
            segment.take_over(1)


def test_a_reader_may_write_its_own_row_alone(tmp_path: Path) -> None:
    Segment.create(tmp_path / "s", LAYOUT).close()
    with Segment.attach(tmp_path / "s", LAYOUT) as segment:
        segment.row_cells("rows", 2)[9 + 3] = 5
        segment.row_array("rows", 1)[0, 8] = 6
        expected = np.zeros((4, 2, 9), dtype=np.int64)
        expected[2, 1, 3], expected[1, 0, 8] = 5, 6
        assert (segment.array("rows") == expected).all()
        assert not segment.array("rows").flags.writeable
        assert len(segment.row_cells("rows", 0)) == 18


def test_rows_are_given_out_of_paged_blocks_only(tmp_path: Path) -> None:
    with Segment.create(tmp_path / "s", LAYOUT) as segment:
        with pytest.raises(ValueError, match="not paged"):
            segment.row_cells("matrix", 0)
        with pytest.raises(ValueError, match="side by side"):
            segment.cells("rows")
        with pytest.raises(ValueError, match="holds 'B'"):
            segment.array("blobs")
        for row in (-1, 4):
            with pytest.raises(IndexError, match="rows 0 to 3"):
                segment.row_array("rows", row)


def test_a_new_writer_is_a_new_epoch(tmp_path: Path) -> None:
    with Segment.create(tmp_path / "s", LAYOUT) as segment, Segment.attach(tmp_path / "s") as reader:
        assert (reader.epoch, reader.writer_pid) == (0, 0)
        assert segment.take_over(77) == 1
        assert segment.take_over(78) == 2
        assert (reader.epoch, reader.writer_pid) == (2, 78)


def test_the_header_alone_tells_the_layout(tmp_path: Path) -> None:
    Segment.create(tmp_path / "s", LAYOUT).close()
    with Segment.attach(tmp_path / "s") as segment:
        assert segment.layout.blocks == LAYOUT.blocks
        assert repr(segment) == f"Segment('{tmp_path}/s', 'example' v3, read-only)"


def test_a_missing_segment_is_named(tmp_path: Path) -> None:
    with pytest.raises(SegmentMissing, match=str(tmp_path / "none")):
        Segment.attach(tmp_path / "none", LAYOUT)
    with pytest.raises(SegmentError, match="cannot create"):
        Segment.create(tmp_path / "none" / "s", LAYOUT)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (Layout("other", 3, LAYOUT.blocks), "layout name"),
        (Layout("example", 4, LAYOUT.blocks), "layout version"),
        (Layout("example", 3, [*LAYOUT.blocks[:1], Block("matrix", (5, 8)), *LAYOUT.blocks[2:]]), "block 'matrix'"),
        (
            Layout("example", 3, [Block("cells", (3,), labels=("A", "C", "B")), *LAYOUT.blocks[1:]]),
            "block 'cells'",
        ),
        (Layout("example", 3, LAYOUT.blocks[:3]), "block 'blobs' is None"),
        (Layout("example", 3, [*LAYOUT.blocks, Block("more", (1,))]), "layout digest"),
    ],
    ids=["name", "version", "shape", "labels", "fewer", "more"],
)
def test_a_mismatch_names_the_field(tmp_path: Path, other: Layout, field: str) -> None:
    Segment.create(tmp_path / "s", other).close()
    with pytest.raises(SegmentMismatch, match=field):
        Segment.attach(tmp_path / "s", LAYOUT)


@pytest.mark.parametrize("content", [b"", b"PENSTOCK", b"\0" * 4096, b"x" * 10_000], ids=len)
def test_a_foreign_file_is_no_segment(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(SegmentMismatch, match="magic"):
        Segment.attach(tmp_path / "s")


def test_a_segment_that_was_cut_off_is_not_mapped(tmp_path: Path) -> None:
    Segment.create(tmp_path / "s", LAYOUT).close()
    os.truncate(tmp_path / "s", LAYOUT.size - PAGE)
    with pytest.raises(SegmentMismatch, match="cut off"):
        Segment.attach(tmp_path / "s", LAYOUT)


@pytest.mark.parametrize("cell", [1, 2, 5, 7])
@pytest.mark.parametrize("value", [-(2**63), -1, 0, 1, 2**40])
def test_a_damaged_header_is_a_mismatch(tmp_path: Path, cell: int, value: int) -> None:
    Segment.create(tmp_path / "s", LAYOUT).close()
    with open(tmp_path / "s", "r+b") as file:
        file.seek(cell * 8)
        file.write(value.to_bytes(8, sys.byteorder, signed=True))
    with pytest.raises(SegmentMismatch):
        Segment.attach(tmp_path / "s", LAYOUT)


def test_a_segment_is_not_created_over_another(tmp_path: Path) -> None:
    Segment.create(tmp_path / "s", LAYOUT).close()
    with pytest.raises(SegmentError, match="exists already"):
        Segment.create(tmp_path / "s", LAYOUT)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_names_the_directory_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    def refuse(_fd: int, _offset: int, _size: int) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SegmentSpace, match=f"shared-memory directory {tmp_path} cannot hold {LAYOUT.size} bytes"):
        Segment.create(tmp_path / "s", LAYOUT)
    assert os.listdir(tmp_path) == []


def _create_within(path: Path, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        Segment.create(path, LAYOUT)
    except SegmentSpace:
        return
    raise AssertionError("created")


def test_memory_is_reserved_at_the_start(tmp_path: Path) -> None:
    with child(_create_within, tmp_path / "s", LAYOUT.size - 1) as process:
        process.join()
    assert os.listdir(tmp_path) == []


def test_what_was_taken_from_a_segment_outlives_its_closing(tmp_path: Path) -> None:
    segment = Segment.create(tmp_path / "s", LAYOUT)
    matrix, cells = segment.array("matrix"), segment.cells("cells")
    segment.close()
    segment.close()
    matrix[0, 0] = 5
    cells[0] = 6
    with Segment.attach(tmp_path / "s") as other:
        assert (other.array("matrix")[0, 0], other.cells("cells")[0]) == (5, 6)
