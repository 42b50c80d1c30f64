"""What is remembered of sessions."""

from __future__ import annotations

from collections import Counter
from typing import cast

import pytest

from broker.counters import FrontendCounters, TotalColumn
from frontend import sessions


class Counts:
    """Counters that nobody shares."""

    def __init__(self) -> None:
        self.seen: Counter[TotalColumn] = Counter()

    def count(self, column: TotalColumn) -> None:
        self.seen[column] += 1


def test_a_session_that_goes_where_it_went_before_is_a_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "REMEMBERED", 2)
    counts = Counts()
    seen = sessions.Sessions(cast("FrontendCounters", counts))
    for session, url in (("a", "x"), ("a", "x"), ("a", "y"), ("b", "x"), ("c", "x"), ("a", "y")):
        seen.chosen(session, url)
    assert counts.seen == {TotalColumn.SESSION_CHOICES: 6, TotalColumn.SESSION_REPEATS: 1}
    assert len(seen._last) == 2


def test_a_name_of_any_length_takes_the_same_room() -> None:
    seen = sessions.Sessions(cast("FrontendCounters", Counts()))
    seen.chosen("s" * (1 << 20), "x")
    assert all(type(key) is int for key in seen._last)
