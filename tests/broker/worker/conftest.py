from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.raw_native import RawPenstock


@pytest.fixture
def penstock() -> Iterator[RawPenstock]:
    with RawPenstock() as penstock:
        yield penstock
