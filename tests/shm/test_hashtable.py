"""The table of keys to sets: what one process sees of it, and whether it is a dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shm.hashtable import HORIZON, MAX_MEMBERS, WAYS, TableReader, TableWriter, blocks
from shm.segment import Layout, Segment, SegmentSpace
from tests.shm.hashtables import ARRAYS, MEMBERS, keys, look, reach, segment, shared
from tests.support.twins import twin

__all__ = ["shared", "twin"]  # fixtures of every test of this file


# -- one process -------------------------------------------------------------------------------------------


def test_a_member_reaches_as_far_as_the_last_key_whose_set_has_it(shared: Segment) -> None:
    writer, reader = TableWriter(shared), TableReader(shared)
    writer.add(keys(1, 2, 3, 4, 5), 7, 1)
    writer.add(keys(1, 2, 3), 60, 2)
    found = reader.find(keys(1, 2, 3, 4, 99, 5))
    assert reach(found) == {60: 3, 7: 6}
    assert found.at.tolist() == [0, 1, 2, 3, 5]
    assert len(found.uses(keys(0, 4))) == 2


def test_of_few_members_alone_the_reach_is_the_same(shared: Segment) -> None:
    writer, reader = TableWriter(shared), TableReader(shared)
    many = np.arange(1, 401, dtype=np.int64)
    for tick, (member, had) in enumerate({60: 400, 7: 391, 0: 130, 8: 3, 69: 300}.items(), 1):
        writer.add(many[:had], member, tick)
    assert reader.reach(many, (7, 60, 5)) == [391, 400, 0]
    assert reader.reach(many, (0, 8, 7, 60, 69)) == [130, 3, 391, 400, 300]
    assert reader.reach(many[:2], (5, 8)) == [0, 2]
    assert reader.reach(keys(), (0,)) == [0]
    assert reader.reach(many, ()) == []
    assert reader.reach(many, tuple(range(MEMBERS))) == reader.find(many).reach[:MEMBERS].tolist()


def test_missing_keys_are_passed_over(shared: Segment) -> None:
    writer, reader = TableWriter(shared), TableReader(shared)
    writer.add(keys(2, 3), 7, 1)
    assert reach(reader.find(keys(1, 2, 3))) == {7: 3}
    assert reach(reader.find(keys(1, 4))) == {}
    assert reach(reader.find(keys())) == {}


def test_uses_fade_with_the_ticks_of_others(shared: Segment) -> None:
    writer, reader = TableWriter(shared), TableReader(shared)
    for tick in (1, 2, 3):
        writer.add(keys(5), 0, tick)
    assert reader.find(keys(5)).uses(keys(0))[0] == pytest.approx(3, rel=0.01)
    writer.add(keys(6), 0, 3 + HORIZON)
    assert reader.find(keys(5)).uses(keys(0))[0] == pytest.approx(3 / np.e, rel=0.01)


def test_what_moved_since_the_look_up_counts_as_unused(shared: Segment) -> None:
    writer, reader = TableWriter(shared), TableReader(shared)
    writer.add(keys(5, 6), 0, 7)
    found = reader.find(keys(5, 6))
    assert (found.uses(keys(0, 1)).tolist(), found.age) == ([1, 1], 0)
    writer.expire(8)
    writer.add(keys(6), 0, 9)
    assert found.uses(keys(0, 1)).tolist() == [0, 0]


def test_a_set_outgrows_its_word_and_stays_exact(shared: Segment) -> None:
    writer, reader = TableWriter(shared), TableReader(shared)
    for member in range(MEMBERS):
        writer.add(keys(1, 2, 3), member, member + 1)
    assert look(reader, 2) == set(range(MEMBERS))


def test_keys_with_a_common_bitmap_part_when_one_of_them_gets_a_member(shared: Segment) -> None:
    writer, reader = TableWriter(shared), TableReader(shared)
    for member in range(6):
        writer.add(keys(1, 2, 3), member, member + 1)
    writer.add(keys(1, 2), 9, 10)
    assert (look(reader, 1), look(reader, 2), look(reader, 3)) == ({*range(6), 9}, {*range(6), 9}, set(range(6)))


def test_without_bitmaps_the_newest_members_are_kept(tmp_path: Path) -> None:
    shared = segment(tmp_path / "table", pool=1)
    writer, reader = TableWriter(shared), TableReader(shared)
    for member in range(5):
        writer.add(keys(1), member, member + 1)  # takes the only bitmap
    for member in range(6):
        writer.add(keys(2), member, member + 10)
    assert look(reader, 1) == set(range(5))
    assert look(reader, 2) == {2, 3, 4, 5}


def test_a_full_bucket_gives_up_what_was_used_longest_ago(tmp_path: Path) -> None:
    shared = segment(tmp_path / "table", capacity=WAYS)
    writer, reader = TableWriter(shared), TableReader(shared)
    for key in range(1, WAYS + 1):
        writer.add(keys(key), 1, key)
    writer.add(keys(1), 1, 100)
    writer.add(keys(99), 1, 101)
    assert look(reader, 2) is None
    assert look(reader, 1) == look(reader, 99) == {1}
    assert len(writer) == WAYS == writer.capacity


def test_a_batch_larger_than_its_bucket_does_not_loop_for_ever(tmp_path: Path) -> None:
    shared = segment(tmp_path / "table", capacity=WAYS)
    writer = TableWriter(shared)
    writer.add(np.arange(1, 1000, dtype=np.int64), 1, 1)
    assert len(writer) == WAYS


def test_expired_keys_go_and_free_their_bitmaps(shared: Segment) -> None:
    writer, reader = TableWriter(shared), TableReader(shared)
    for member in range(6):
        writer.add(keys(1, 2), member, 1)
    writer.add(keys(3), 0, 5)
    assert writer.expire(5) == 2
    assert look(reader, 1) is None
    assert look(reader, 3) == {0}
    assert sum(writer._holders) == 0
    assert len(writer._free) == 64


def test_a_forgotten_member_is_in_no_set_and_leaves_no_empty_one(shared: Segment) -> None:
    writer, reader = TableWriter(shared), TableReader(shared)
    writer.add(keys(1, 2), 3, 1)
    for member in range(6):
        writer.add(keys(4), member, 2)
    writer.add(keys(2), 69, 3)
    writer.forget([3, 5])
    assert (look(reader, 1), look(reader, 2), look(reader, 4)) == (None, {69}, {0, 1, 2, 4})
    writer.add(keys(2), 6, 4)
    writer.add(keys(2), 7, 5)
    writer.add(keys(2), 8, 6)
    assert look(reader, 2) == {69, 6, 7, 8}


def test_the_next_writer_goes_on_where_the_last_one_ended(shared: Segment) -> None:
    writer, reader = TableWriter(shared), TableReader(shared)
    for member in range(6):
        writer.add(keys(1, 2), member, member + 1)
    again = TableWriter(shared)
    assert again._holders == writer._holders
    again.add(keys(1), 9, 7)
    assert (look(reader, 1), look(reader, 2)) == ({*range(6), 9}, set(range(6)))


def test_a_million_keys_and_a_thousand_members_take_25_5_mib() -> None:
    assert 25 << 20 < Layout("table", 1, blocks(1 << 20, 1024, 4096)).size < 26 << 20


def test_a_table_that_does_not_fit_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SegmentSpace, match="cannot hold"):
        segment(tmp_path / "table", capacity=1 << 50)


@pytest.mark.parametrize(("count", "pool"), [(0, 1), (MAX_MEMBERS + 1, 1), (1, 0), (1, 1 << 17)])
def test_sizes_that_no_word_can_name_are_refused(count: int, pool: int) -> None:
    with pytest.raises(ValueError, match="a table has"):
        blocks(16, count, pool)


# -- against a dict ----------------------------------------------------------------------------------------

few_keys = st.lists(st.integers(1, WAYS), min_size=1, max_size=WAYS, unique=True)
many_keys = st.lists(st.integers(1, 200), min_size=1, max_size=60, unique=True)
any_member = st.integers(0, MEMBERS - 1)


def operations(batch: st.SearchStrategy[list[int]]) -> st.SearchStrategy[list[tuple[str, Any, int]]]:
    add = st.tuples(st.just("add"), batch, any_member)
    forget = st.tuples(st.just("forget"), st.lists(any_member, max_size=3), st.just(0))
    return st.lists(st.one_of(add, add, add, forget), max_size=40)


@settings(deadline=None)
@given(steps=operations(few_keys))
def test_is_a_dict_of_sets_while_nothing_must_go(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    shared = segment(tmp_path_factory.getbasetemp() / "dict", pool=1024)
    writer, reader = TableWriter(shared), TableReader(shared)
    model: dict[int, set[int]] = {}
    for tick, (name, what, member) in enumerate(steps, 1):
        if name == "add":
            writer.add(keys(*what), member, tick)
            for key in what:
                model.setdefault(key, set()).add(member)
        else:
            writer.forget(what)
            model = {key: left for key, had in model.items() if (left := had - set(what))}
        assert {key: had for key in range(1, WAYS + 1) if (had := look(reader, key)) is not None} == model
        assert TableWriter(shared)._holders == writer._holders
    assert len(writer) == len(model)


@settings(deadline=None)
@given(steps=operations(many_keys))
def test_forgets_but_never_invents_when_full(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    shared = segment(tmp_path_factory.getbasetemp() / "full", capacity=2 * WAYS, pool=2)
    writer, reader = TableWriter(shared), TableReader(shared)
    model: dict[int, set[int]] = {}
    for tick, (name, what, member) in enumerate(steps, 1):
        if name == "add":
            writer.add(keys(*what), member, tick)
            for key in what:
                model.setdefault(key, set()).add(member)
        else:
            writer.forget(what)
            model = {key: had - set(what) for key, had in model.items()}
        for key in range(1, 201):
            assert (look(reader, key) or set()) <= model.get(key, set())
        assert len(writer) <= 2 * WAYS
        assert TableWriter(shared)._holders == writer._holders


@settings(max_examples=40)
@given(steps=operations(many_keys), pool=st.sampled_from([1, 4, 64]))
def test_the_twins_enter_the_same(tmp_path_factory: pytest.TempPathFactory, steps: Any, pool: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    one, other = (segment(folder / name, capacity=8 * WAYS, pool=pool) for name in ("one", "other"))
    writer, by_itself = TableWriter(one), TableWriter(other)
    by_itself._compiled = None
    for tick, (name, what, member) in enumerate(steps, 1):
        for either in (writer, by_itself):
            either.add(keys(*what), member, tick * 50) if name == "add" else either.forget(what)
        assert writer._holders == by_itself._holders
        assert sorted(writer._free) == sorted(by_itself._free)
    for block in ("cells", "sequence", "keys"):
        assert one.array(block).tolist() == other.array(block).tolist(), block
    for key in range(1, 201):
        assert look(TableReader(one), key) == look(TableReader(other), key)
    assert np.abs(one.array("uses") - other.array("uses")).max() <= 1  # exp differs by library


@settings(max_examples=40)
@given(steps=operations(many_keys), asked=st.lists(st.integers(1, 220), max_size=150))
def test_the_twins_find_the_same(tmp_path_factory: pytest.TempPathFactory, steps: Any, asked: list[int]) -> None:
    shared = segment(tmp_path_factory.getbasetemp() / "twins", capacity=8 * WAYS, pool=4)
    writer, reader = TableWriter(shared), TableReader(shared)
    for tick, (name, what, member) in enumerate(steps, 1):
        writer.add(keys(*what), member, tick) if name == "add" else writer.forget(what)
    found, expected = reader.find(keys(*asked)), reader._find(keys(*asked), np.zeros_like(reader.find(keys()).reach))
    assert found.at.tolist() == expected.at.tolist()
    assert reach(found) == reach(expected)
    assert found.places.tolist() == expected.places.tolist()
    assert found.moments.tolist() == expected.moments.tolist()
    assert reader.reach(keys(*asked), (3, 69, 0)) == found.reach[[3, 69, 0]].tolist()
    every = np.arange(len(found.at))
    counts = found.uses(every)
    reader._compiled = None
    assert counts.tolist() == pytest.approx(found.uses(every).tolist())


def test_the_compiled_twin_reads_and_writes_nothing_that_is_not_there(shared: Segment, twin: str) -> None:
    if twin == "python":
        return
    for member in range(6):
        TableWriter(shared).add(keys(1), member, 1)
    table = TableReader(shared)._compiled
    assert table is not None
    with pytest.raises(ValueError, match="room"):
        table.find(keys(1, 2), keys(*range(5)), keys(0))
    out, reached = keys(0, 0, 0), keys(0, 0, 0)
    assert table.find(keys(1), out, reached) == 1
    assert reached.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="int64"):
        table.find(np.zeros(3, dtype=np.int8), out, reached)
    for wrong in ((-1,), (1 << 40,), (64 * 2,), (1, 1), tuple(range(65))):
        with pytest.raises(ValueError, match="member"):
            table.reach(keys(1), wrong)
    arrays = [shared.array(name) for name in ("cells", *(name[1:] for name in ARRAYS))]
    for place in range(6):
        with pytest.raises(ValueError, match="one table"):
            type(table)(*arrays[:place], arrays[place].reshape(-1)[:-1].copy(), *arrays[place + 1 :])
    for member in (-1, 64 * 2):
        with pytest.raises(ValueError, match="member"):
            table.add(keys(1), member, 1)
    with pytest.raises(ValueError, match="only read"):
        TableReader(Segment.attach(shared.path))._compiled.add(keys(1), 1, 1)  # type: ignore[union-attr]  # as above
    shared.array("members")[:] = -1 << 62  # names a bitmap beyond the last
    assert table.find(keys(1), out, reached) == 0
    assert table.reach(keys(1), (1,)) == [0]
    assert table.add(keys(1), 1, 1) is None
    counts = np.ones(4)
    table.uses(keys(-1, 1 << 40, 0), keys(0, 0, -2), keys(-1, 0, 1, 7), 1, counts)
    assert counts.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="different lengths"):
        table.uses(keys(1), keys(1, 2), keys(0), 1, counts)
