"""Store, then load of another cell, on two CPUs at once: the one order that x86-64 does not keep by itself.

Two processes meet at round i, each stores i to its own cell and loads the other's.
Allowed: either or both see the other's i. Forbidden: neither does (both stores still wait in their store buffers).
Measured without the fence: about 1.5 % of the rounds.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from shm import fence
from shm.segment import Block, Layout, Segment
from tests.support.children import child

ROUNDS = 20_000
LINE = 16
"""Cells apart: two cache lines, so that no prefetch couples them."""
LAYOUT = Layout("litmus", 1, [Block("cells", (4 * LINE,)), Block("saw", (2, ROUNDS + 1))])

needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="reordering shows between two CPUs only")


def _meet(path: Path, me: int, fenced: bool) -> None:
    segment = Segment.attach(path, LAYOUT, writable=True)
    cells = segment.cells("cells")
    saw = segment.cells("saw")[me * (ROUNDS + 1) :]
    mine, theirs = me * LINE, (1 - me) * LINE
    ready, other_ready = mine + 2 * LINE, theirs + 2 * LINE
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[me]})
    full = fence.full
    for number in range(1, ROUNDS + 1):
        cells[ready] = number
        while cells[other_ready] < number:
            pass
        # Two loops' bodies in one would put a branch between the store and the load.
        if fenced:
            cells[mine] = number
            full()
            saw[number] = cells[theirs]
        else:
            cells[mine] = number
            saw[number] = cells[theirs]


def _missed(path: Path, *, fenced: bool) -> int:
    """Rounds in which neither saw the other."""
    with Segment.create(path, LAYOUT) as segment:
        with child(_meet, path, 0, fenced) as one, child(_meet, path, 1, fenced) as other:
            one.join()
            other.join()
        saw = segment.array("saw")
        return int((saw < np.arange(ROUNDS + 1)).all(axis=0).sum())


@needs_two
@pytest.mark.parametrize("times", [1, pytest.param(50, marks=pytest.mark.stress)])
def test_behind_a_fence_one_of_two_sees_the_other(tmp_path: Path, times: int) -> None:
    assert [_missed(tmp_path / f"{number}", fenced=True) for number in range(times)] == [0] * times


@needs_two
@pytest.mark.skipif(not fence.promised(), reason="what this CPU does is not argued for")
def test_without_a_fence_both_may_miss_each_other(tmp_path: Path) -> None:
    """On a busy machine the two are rarely on their CPUs at the same moment, so it gets many chances."""
    assert any(_missed(tmp_path / f"{number}", fenced=False) for number in range(50))
