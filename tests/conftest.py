"""Settings of the whole suite."""

from __future__ import annotations

from hypothesis import settings

# The same examples at every run, so that a failure is a change's; and no time limit for one example, because the
# machine is shared.
settings.register_profile("penstock", deadline=None, derandomize=True)
settings.load_profile("penstock")
