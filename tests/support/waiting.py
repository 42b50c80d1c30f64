"""Waiting for a condition, never for a time: polls until it holds, and fails with words when it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.02
PATIENCE_S = 60.0
"""How long a test waits, unless a shorter time is its point. On an idle machine nothing takes a tenth of it: it ends a
test that would hang, and says nothing of speed, as a busy machine may be many times slower."""


def until(condition: Callable[[], T | None], what: object, within: float = PATIENCE_S) -> T:
    """The first truthy value of `condition()`. `what` (an object, or a callable making one) explains a failure."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(_never(within, what, value))
        time.sleep(POLL_S)
    return value


async def eventually(condition: Callable[[], T | None], what: object, within: float = PATIENCE_S) -> T:
    """`until` for coroutines: the event loop goes on in between."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(_never(within, what, value))
        await asyncio.sleep(POLL_S)
    return value


def _never(within: float, what: object, last: object) -> str:
    return f"not within {within:g} s: {what() if callable(what) else what} (last seen: {last!r})"
