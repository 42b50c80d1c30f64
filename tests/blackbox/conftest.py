"""One router per mode for the whole suite, each with quick checks and a full log; what needs its own starts one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.blackbox.router import Router

QUICK = {
    "manager": {"health-check-interval-secs": 0.25, "health-check-timeout-secs": 10.0},
    "scheduler": {"stats-interval-secs": 0.3, "eviction-interval-secs": 0.3},
    "log": {"level": "debug"},
}


@pytest.fixture(scope="session")
def mixed_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(tmp_path_factory.mktemp("mixed"), config=QUICK) as router:
        yield router


@pytest.fixture(scope="session")
def pair_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Router]:
    with Router(tmp_path_factory.mktemp("pairs"), "--splitwise", config=QUICK) as router:
        yield router


@pytest.fixture
def mixed(mixed_router: Router) -> Iterator[Router]:
    """Empty, and empty again afterwards."""
    mixed_router.await_empty()
    yield mixed_router
    mixed_router.dismiss()


@pytest.fixture
def pairs(pair_router: Router) -> Iterator[Router]:
    pair_router.await_empty()
    yield pair_router
    pair_router.dismiss()
