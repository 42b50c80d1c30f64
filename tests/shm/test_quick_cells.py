"""Single cells, gauges and the fence: the Python twins and those in C keep the same contract."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shm import cells as module
from shm import fence
from shm.cells import Gauges, Measures, gauges, quick
from tests.support.twins import twin

__all__ = ["twin"]

FINISHED, STARTED = 0, 1
BIGGEST = 2**63 - 1


def block(rows: int, width: int) -> NDArray[np.int64]:
    """Counters of a segment: rows on pages of their own."""
    pages = np.zeros((rows, 3, width + 7), dtype=np.int64)
    return pages[:, :, :width]


def cell(value: int) -> memoryview:
    return memoryview(np.array([value], dtype=np.int64))


# -- single cells ------------------------------------------------------------------------------------------


def test_a_cell_is_loaded_and_stored_alone() -> None:
    under = np.arange(4, dtype=np.int64)
    cells = quick(memoryview(under))
    cells[1] += BIGGEST - 1
    cells[-1] = -5
    assert under.tolist() == [0, BIGGEST, 2, -5]
    assert [cells[i] for i in (0, 1, 2, 3, -4)] == [0, BIGGEST, 2, -5, 0]


def test_cells_are_raised_in_the_order_that_they_are_named() -> None:
    under = np.array([1, 2, 3], dtype=np.int64)
    module.add(quick(memoryview(under)), 2, 5, 0, -1)
    assert under.tolist() == [0, 2, 8]
    with pytest.raises(IndexError):
        module.add(quick(memoryview(under)), 1, 1, 3, 1)
    assert under.tolist() == [0, 3, 8]


class Watched:
    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []

    def __getitem__(self, index: int) -> int:
        return 10 * index

    def __setitem__(self, index: int, value: int) -> None:
        self.events.append((index, value))


@pytest.mark.parametrize("add", [module.add, module._add])
def test_cells_of_any_kind_are_raised(add: Callable[..., None]) -> None:
    cells = Watched()
    add(cells, 3, 1, 1, 0)
    assert cells.events == [(3, 31), (1, 10)]
    with pytest.raises((TypeError, ValueError)):
        add(cells, 3)


def test_cells_that_are_only_read_cannot_be_raised() -> None:
    under = np.zeros(4, dtype=np.int64)
    under.setflags(write=False)
    with pytest.raises(TypeError, match="read-only"):
        module.add(quick(memoryview(under)), 3, 1)


@pytest.mark.parametrize("index", [4, -5, 2**70])
def test_a_cell_that_is_not_there_is_an_error(index: int) -> None:
    cells = quick(memoryview(np.zeros(4, dtype=np.int64)))
    with pytest.raises(IndexError):
        cells[index]
    with pytest.raises(IndexError):
        cells[index] = 1


def test_cells_that_are_only_read_cannot_be_stored_to() -> None:
    under = np.zeros(4, dtype=np.int64)
    under.setflags(write=False)
    cells = quick(memoryview(under))
    assert cells[3] == 0
    with pytest.raises(TypeError, match="read-only"):
        cells[3] = 1


@pytest.mark.parametrize("value", [1.0, "1", None])
def test_a_cell_holds_an_int(value: object) -> None:
    with pytest.raises(TypeError):
        quick(memoryview(np.zeros(4, dtype=np.int64)))[0] = value  # type: ignore[assignment]  # the mistake


def test_released_cells_are_out_of_reach_and_what_lay_under_them_is_free() -> None:
    under = bytearray(16)
    cells = quick(memoryview(under).cast("q"))
    cells.release()
    cells.release()
    under.append(1)  # BufferError while anything is held
    with pytest.raises(ValueError, match="released"):
        cells[0]
    with pytest.raises(ValueError, match="released"):
        cells[0] = 1


def test_cells_of_another_kind_are_refused() -> None:
    if module.compiled is not None:
        with pytest.raises(ValueError, match="int64"):
            quick(memoryview(bytearray(15)))


# -- gauges ------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 80), st.integers(0, 2**32))
def test_gauges_are_the_sums_over_the_rows_that_ever_lived(live: int, used: int, seed: int) -> None:
    counters, rng = block(6, 90), Random(seed)
    for index in np.ndindex(6, 3, used):
        counters[index] = rng.randrange(2**40)
    sums = counters[:live].sum(axis=0)
    wanted = (sums[STARTED] - sums[FINISHED]).tolist()
    it = gauges(counters, cell(live), cell(used))
    places = tuple(rng.choices(range(used), k=rng.randrange(used + 1)))
    out = np.full(len(places), -1, dtype=np.int64)
    it.many(FINISHED, STARTED, np.array(places, dtype=np.int64), out)
    assert it.few(FINISHED, STARTED, places) == tuple(out.tolist()) == tuple(wanted[place] for place in places)
    assert it.one(FINISHED, STARTED, used - 1) == wanted[used - 1]


def test_a_row_that_comes_to_life_is_seen_at_once() -> None:
    counters, live, used = block(3, 4), cell(1), cell(1)
    it = gauges(counters, live, used)
    assert it.few(FINISHED, STARTED, (0,)) == (0,)
    counters[2, STARTED] = 7
    live[0], used[0] = 3, 4
    assert it.few(FINISHED, STARTED, (3, 0)) == (7, 7)


@pytest.mark.parametrize("places", [(4,), (-1,), (2**62,)])
def test_no_gauge_lies_outside_of_the_block(places: tuple[int, ...]) -> None:
    if module.compiled is None:
        pytest.skip("numpy sees to it")
    it = gauges(block(2, 4), cell(2), cell(4))
    with pytest.raises(IndexError):
        it.few(FINISHED, STARTED, places)
    with pytest.raises(IndexError):
        it.many(FINISHED, STARTED, np.array(places), np.zeros(1, dtype=np.int64))
    for columns in ((3, 0), (0, -1)):
        with pytest.raises(IndexError):
            it.one(*columns, 0)


def test_more_rows_than_there_are_count_for_no_more() -> None:
    counters = block(2, 4)
    counters[:, STARTED] = 1
    assert gauges(counters, cell(9), cell(4)).few(FINISHED, STARTED, (2,)) == (2,)


Ask = Callable[[Measures], int]
WAYS: dict[str, Ask] = {
    "one": lambda it: it.one(FINISHED, STARTED, 1),
    "few": lambda it: it.few(FINISHED, STARTED, (0, 1))[1],
    "many": lambda it: _many(it),
}


def _many(it: Measures) -> int:
    out = np.zeros(2, dtype=np.int64)
    it.many(FINISHED, STARTED, np.array([0, 1]), out)
    return int(out[1])


@pytest.mark.parametrize("way", WAYS)
def test_finished_is_loaded_before_started(way: str) -> None:
    """Between any two loads a request comes and goes: the gauge may be too high for that moment, never too low."""
    if module.compiled is None:
        pytest.skip("numpy's loads cannot be interrupted; shm.cells says their order")
    counters = block(2, 4)
    counters[:, STARTED] = 5
    counters[:, FINISHED] = 3
    it = module.compiled.Gauges(counters, cell(2), cell(4))

    def come_and_go() -> None:
        counters[1, STARTED, 1] += 1
        counters[1, FINISHED, 1] += 1

    it.before_load(come_and_go)
    assert WAYS[way](it) > 4
    it.before_load(None)
    assert WAYS[way](it) == 4


def test_each_twin_is_the_one_that_was_asked_for(twin: str) -> None:
    it = gauges(block(1, 1), cell(1), cell(1))
    assert isinstance(it, Gauges) is (twin == "python")


# -- the fence ---------------------------------------------------------------------------------------------


def test_a_fence_returns_nothing_and_takes_nothing() -> None:
    for full in (fence.by_lock, fence.full):
        full()
    assert not fence._lock.locked()
