"""Whether compiled twins are used. Each stands beside the Python code that it copies, which does without it."""

from __future__ import annotations

import os

SWITCH = "PENSTOCK_COMPILED"
"""Environment variable; 0 switches every compiled twin off."""


def is_wanted() -> bool:
    """Looked at when a module that has a twin is imported."""
    return os.environ.get(SWITCH, "1") != "0"
