"""A directory for the shared memory of one Penstock: in memory where there is such a place, and of a short name,
because unix sockets are made below it, whose paths have at most 107 bytes. Test directories can be longer than that."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")


def fresh() -> Path:
    """A name that nobody has; whoever makes the directory removes it."""
    parent = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    return parent / f"pst-{secrets.token_hex(4)}"
