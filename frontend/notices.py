"""Tells the scheduler where this frontend sent prompts, so that the others know; see `broker.prefix`.

    policy --note--> PrefixIndex --batch, every few ms while there is something--> control.sock

It never waits, and nothing is said twice: what the scheduler does not take at once is lost, and counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from broker.counters import FrontendCounters, TotalColumn
from broker.prefix import PrefixIndex
from broker.wire import RoutingNotices

SEND_S = 0.005
"""What others may not know of a choice yet; with the scheduler's work, a few milliseconds more."""
AT_ONCE = 8
"""Batches in one turn of the loop: 512 notices, 100,000 a second."""


class Notices:
    """Owned by the frontend's process; everything on its loop's thread."""

    def __init__(
        self,
        index: PrefixIndex,
        counters: FrontendCounters,
        send: Callable[[RoutingNotices], bool],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """`send` says whether the scheduler will get the message."""
        self._index = index
        self._counters = counters
        self._send = send
        self._loop = loop
        self._counted = 0
        self._timer: asyncio.TimerHandle | None = None
        index.on_note = self._arm

    def close(self) -> None:
        self._index.on_note = lambda: None
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(SEND_S, self._tell)

    def _tell(self) -> None:
        self._timer = None
        lost = 0
        for _ in range(AT_ONCE):
            notices = self._index.batch()
            if notices is None:
                break
            if not self._send(notices):
                lost += len(notices.slots)
        else:
            self._arm()
        lost += self._index.lost - self._counted
        self._counted = self._index.lost
        if lost:
            self._counters.count(TotalColumn.NOTICES_LOST, lost)
