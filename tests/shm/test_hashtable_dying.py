"""The writer of the table of keys to sets, killed at every store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shm.hashtable import WAYS, TableReader, TableWriter
from shm.segment import Segment
from tests.shm.hashtables import FOREVER, keys, look, segment
from tests.support.twins import twin

__all__ = ["twin"]  # for every test of this file


class Killed(Exception):
    pass


class Mortal(TableWriter):
    """Dies after so many stores, each cell of a vector being one."""

    stores = FOREVER

    def __init__(self, segment: Segment) -> None:
        super().__init__(segment)
        if self._compiled is not None:
            self._compiled.before_store(self._store)

    def _store(self) -> None:
        if not self.stores:
            raise Killed
        self.stores -= 1

    def _put(self, cells: Any, where: Any, value: Any) -> None:
        if isinstance(where, tuple):
            cells, where = cells[:, where[1]], np.arange(len(cells))
        if np.ndim(where) == 0:
            self._store()
            super()._put(cells, where, value)
            return
        count = min(self.stores, len(where))
        super()._put(cells, where[:count], np.broadcast_to(value, where.shape)[:count])
        self.stores -= count
        if count < len(where):
            raise Killed


def _new_keys(writer: TableWriter) -> None:
    writer.add(keys(100, 101, 102), 42, 50)


def _known_and_new(writer: TableWriter) -> None:
    writer.add(keys(1, 2, 101), 42, 50)


def _to_bitmap(writer: TableWriter) -> None:
    writer.add(keys(3, 4), 42, 50)


def _split_bitmap(writer: TableWriter) -> None:
    writer.add(keys(5), 42, 50)


def _evicting(writer: TableWriter) -> None:
    writer.add(np.arange(200, 240, dtype=np.int64), 42, 50)


def _forget(writer: TableWriter) -> None:
    writer.forget([0, 1])


def _expire(writer: TableWriter) -> None:
    writer.expire(4)


def _furnished(path: Path) -> tuple[Segment, Mortal]:
    """1, 2 have a word; 3, 4 a full word; 5, 6 a bitmap; 7 only what will be forgotten; both buckets have room."""
    shared = segment(path, capacity=2 * WAYS)
    writer = Mortal(shared)
    writer.add(keys(1, 2), 0, 1)
    writer.add(keys(1, 2), 9, 2)
    for member in range(4):
        writer.add(keys(3, 4), member, 3)
    for member in range(6):
        writer.add(keys(5, 6), member, 4)
    writer.add(keys(7), 1, 5)
    return shared, writer


@pytest.mark.parametrize("change", [_new_keys, _known_and_new, _to_bitmap, _split_bitmap, _evicting, _forget, _expire])
def test_dying_at_any_store_leaves_old_or_new_sets_or_none(
    tmp_path: Path, change: Callable[[TableWriter], None]
) -> None:
    every = [*range(1, 8), *range(100, 103), *range(200, 240)]
    shared, writer = _furnished(tmp_path / "table")
    before = {key: look(TableReader(shared), key) for key in every}
    writer.stores = FOREVER
    change(writer)
    needed = FOREVER - writer.stores
    after = {key: look(TableReader(shared), key) for key in every}
    everything = {key: (before[key] or set()) | (after[key] or set()) for key in every}
    for stores in range(needed + 1):
        shared, writer = _furnished(tmp_path / "table")
        reader = TableReader(shared)
        writer.stores = stores
        if stores < needed:
            with pytest.raises(Killed):
                change(writer)
        else:
            change(writer)
        left = {key: look(reader, key) for key in every}
        successor = TableWriter(shared)
        for seen in (left, {key: look(reader, key) for key in every}):
            for key, found in seen.items():
                # Forgetting two members at once may have done one of them.
                assert found in (
                    None,
                    before[key],
                    after[key],
                    {42} if change is _evicting and key >= 200 else None,
                ) or (change is _forget and (after[key] or set()) <= (found or set()) <= everything[key]), (stores, key)
        assert not (successor._sequence & 1).any()
        change(successor)  # done again, it is done
        if change is not _evicting:  # which of many equally old keys go may differ
            assert {key: look(reader, key) for key in every} == after
        assert TableWriter(shared)._holders == successor._holders
