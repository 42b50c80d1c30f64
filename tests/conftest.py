"""Settings of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

import broker

# The same examples at every run, so that a failure is a change's; and no time limit for one example, because the
# machine is shared.
settings.register_profile("penstock", deadline=None, derandomize=True)
settings.load_profile("penstock")

ROOT = Path(__file__).parents[1]

# Processes that tests start run what the tests themselves run: the sources, or the compiled build of them.
os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(broker.__path__[0]).parent), str(ROOT)))
os.environ["PYTHONSAFEPATH"] = "1"

PROCESSES = (
    "benchmarks/guard",
    "tests/blackbox",
    "tests/broker/cluster",
    "tests/broker/scheduler/test_scheduler_process.py",
    "tests/broker/worker",
    "tests/chaos",
    "tests/e2e",
    "tests/frontend/test_process.py",
    "tests/stress",
    "tests/support",
)
"""What starts processes, or measures: one after another, while `make test` has the other core run the rest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    together = tuple(ROOT / path for path in PROCESSES)
    for item in items:
        if any(item.path.is_relative_to(path) for path in together):
            item.add_marker(pytest.mark.xdist_group("processes"))
