"""What the last reports of candidates come to."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from broker.candidates import _NEVER, FIRST, Vector, _of_few, _of_many
from broker.table import Column
from broker.types import Trust

REPORTS = st.tuples(
    st.sampled_from(Trust),
    st.integers(-1, 5),  # running and waiting; -1 is unknown
    st.integers(-1, 5),
    st.integers(0, 9),  # in flight then
    st.integers(0, 20),  # reported; 0 is never
)


def columns(reports: list[tuple[Trust, int, int, int, int]]) -> Vector:
    found = np.zeros((Column.IN_FLIGHT_THEN + 1 - FIRST, len(reports)), dtype=np.int64)
    named = Column.TRUST, Column.RUNNING, Column.WAITING, Column.IN_FLIGHT_THEN, Column.REPORTED_NS
    for place, report in enumerate(reports):
        for column, value in zip(named, report, strict=True):
            found[column - FIRST, place] = value
    return found


@given(st.lists(REPORTS, min_size=1, max_size=20), st.integers(0, 20))
def test_few_and_many_come_to_the_same(reports: list[tuple[Trust, int, int, int, int]], since_ns: int) -> None:
    few, many = _of_few(columns(reports), since_ns), _of_many(columns(reports), since_ns)
    assert [few[0].tolist(), few[1].tolist(), few[2]] == [many[0].tolist(), many[1].tolist(), many[2]]
    assert few[0].dtype == few[1].dtype == np.int64


def test_only_what_is_fresh_and_whole_counts() -> None:
    reports = [
        (Trust.EXACT, 3, 2, 4, 11),
        (Trust.EXACT, 3, 2, 4, 10),  # too old
        (Trust.EXACT, -1, 2, 4, 12),
        (Trust.APPROX, 3, -1, 4, 13),
        (Trust.APPROX, 0, 0, 4, 14),
    ]
    added, trust, oldest_ns = _of_few(columns(reports), 10)
    assert added.tolist() == [1, 0, 0, 0, -4]
    assert trust.tolist() == [Trust.EXACT, Trust.STALE, Trust.EXACT, Trust.APPROX, Trust.APPROX]
    assert oldest_ns == 11
    assert _of_few(columns(reports), 14)[2] == _NEVER
