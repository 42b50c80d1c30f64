"""A process attaches while another creates.

Allowed: SegmentMissing; a complete segment.
Forbidden: a segment that is incomplete (SegmentMismatch), or death by SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shm.segment import Block, Layout, Segment, SegmentMismatch, SegmentMissing
from tests.support.children import child

LAYOUT = Layout("big", 1, [Block("matrix", (64, 1024)), Block("last", (1,))])


def _create(path: Path) -> None:
    Segment.create(path, LAYOUT).close()


def _create_in_place(path: Path) -> None:
    """The protection removed: it takes shape under its final name."""
    rename, os.rename = os.rename, lambda *_: None
    spare, Path.with_name = Path.with_name, lambda self, _: self  # type: ignore[method-assign]  # in this child only
    try:
        _create(path)
    finally:
        os.rename, Path.with_name = rename, spare  # type: ignore[method-assign]  # as above


def _create_for_ever(path: Path, create: Callable[[Path], None]) -> None:
    while True:
        create(path)
        os.unlink(path)


def _run(path: Path, create: Callable[[Path], None], wanted: int) -> list[str]:
    """The first thing forbidden that attaching met, until it succeeded `wanted` times."""
    findings: list[str] = []
    complete = 0
    with child(_create_for_ever, path, create):
        while complete < wanted and not findings:
            try:
                with Segment.attach(path, LAYOUT) as segment:
                    complete += segment.array("last")[0] == 0
            except SegmentMissing:
                pass
            except SegmentMismatch as error:
                findings.append(str(error))
    return findings


@pytest.mark.parametrize("times", [100, pytest.param(2_000, marks=pytest.mark.stress)])
def test_a_segment_is_missing_or_complete(tmp_path: Path, times: int) -> None:
    assert _run(tmp_path / "s", _create, times) == []


def test_built_in_place_it_is_met_half_made(tmp_path: Path) -> None:
    assert _run(tmp_path / "s", _create_in_place, 10_000) != []
