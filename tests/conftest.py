"""Settings of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import HealthCheck, settings

import broker

# The same examples at every run, so that a failure is a change's; and no limit of time, neither for an example nor for
# drawing it, because the machine is shared.
settings.register_profile("penstock", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("penstock")

ROOT = Path(__file__).parents[1]

# Processes that tests start run what the tests themselves run: the sources, or the compiled build of them.
os.environ["PYTHONPATH"] = os.pathsep.join((str(Path(broker.__path__[0]).parent), str(ROOT)))
os.environ["PYTHONSAFEPATH"] = "1"
