"""How many files and connections a process may have open."""

from __future__ import annotations

import resource


def allow_most() -> None:
    """Raises this process's limit to what it may be raised to.

    A connection takes a descriptor, a request to an HTTP engine two; the usual soft limit of 1,024 is meant for
    programs that use select().
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
