"""Counters that only rise, and their settling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shm.cells import CounterRow, settle

STARTED, FINISHED, ABANDONED = range(3)
WIDTH = 5


def test_a_counter_is_one_cell_of_its_row() -> None:
    cells = np.zeros((3, WIDTH), dtype=np.int64)
    row = CounterRow(memoryview(cells.reshape(-1)), WIDTH)
    row.add(FINISHED, 4)
    row.add(FINISHED, 4, 6)
    assert row.load(FINISHED, 4) == 7
    assert cells.tolist() == [[0] * 5, [0, 0, 0, 0, 7], [0] * 5]


def test_a_counter_never_falls() -> None:
    row = CounterRow(memoryview(np.zeros(3 * WIDTH, dtype=np.int64)), WIDTH)
    with pytest.raises(ValueError, match="only rises"):
        row.add(STARTED, 0, -1)


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 1000)), min_size=WIDTH, max_size=WIDTH))
def test_settling_ends_what_was_in_flight_and_lowers_nothing(owner: list[tuple[int, int]]) -> None:
    row = np.zeros((3, WIDTH), dtype=np.int64)
    row[FINISHED] = [finished for finished, _ in owner]
    row[STARTED] = [finished + in_flight for finished, in_flight in owner]
    row[ABANDONED] = 3
    before = row.copy()
    lost = settle(row, STARTED, FINISHED, ABANDONED)
    assert lost == sum(in_flight for _, in_flight in owner)
    assert (row[STARTED] == row[FINISHED]).all()
    assert (row >= before).all()
    assert (row[ABANDONED] - 3).tolist() == [in_flight for _, in_flight in owner]
    assert settle(row, STARTED, FINISHED, ABANDONED) == 0
