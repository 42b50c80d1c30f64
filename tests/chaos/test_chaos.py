"""A minute of `make chaos`, for continuous integration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.blows import LEAST_PER_MINUTE
from tests.chaos.run import chaos

SECONDS, SEED = 60.0, 20260722


@pytest.mark.timeout(400)
def test_a_minute_of_kills_loses_nothing_answers_nothing_twice_and_leaves_nothing_behind(tmp_path: Path) -> None:
    verdict, blows = chaos(tmp_path, SECONDS, SEED, print)
    assert verdict.failures == []
    assert len(blows) >= LEAST_PER_MINUTE * SECONDS / 60
