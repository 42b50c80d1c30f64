"""Requests that wait inside a loaded engine are taken back and sent to an idle one.

What is sent to an engine whose capacity nobody knows waits there once it is full, and an instance that joins or becomes
idle a moment later cannot help: the queue at Penstock is empty. So each frontend looks, a few times a second, for

    an engine that is full    requests waited in its last two reports, and it stops computing what is hung up on
    an idle instance          that could serve them: nothing in flight, nothing running, not held for those in line
    a request between them    sent here before the last report, no first byte yet, not moved before: the youngest, as
                              engines serve the oldest first, so that it is the last one in there

and moves it: a lease at the idle instance first, then the abort. One per idle instance and look, and not more than
`scheduler.rescues-per-sec`. Legs of prefill/decode pairs are never moved: their peer waits for them where they are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from broker.config import Scheduler
from broker.engines import DIALECTS
from broker.errors import PenstockError
from broker.lease import Lease
from broker.route import RouteRequest
from broker.saturation import FULL_REPORTS, Saturation
from broker.table import Column
from broker.types import Trust
from broker.view import TableReader
from frontend.admission import Admission
from frontend.dispatch import Choice
from frontend.forward import Forward
from frontend.forwarder import Forwarder

LOOK_S = 0.25


class Rescuer:
    """Of one frontend; works on the loop's thread from its making to `close`."""

    def __init__(
        self,
        config: Scheduler,
        table: TableReader,
        admission: Admission,
        forwarder: Forwarder,
        loop: asyncio.AbstractEventLoop,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`rescues_per_sec` above 0."""
        self._rate = config.rescues_per_sec
        self._table = table
        self._saturation = Saturation(table, config.instance_capacity, clock_ns)
        self._clock_ns = clock_ns
        self._admission = admission
        self._forwarder = forwarder
        self._loop = loop
        self._credit = 1.0
        self._timer = loop.call_later(LOOK_S, self._look)

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK_S, self._look)
        self._credit = min(max(1.0, self._rate), self._credit + self._rate * LOOK_S)
        now_s, now_ns = self._forwarder.clock(), self._clock_ns()
        reported: dict[int, float | None] = {}
        taken: set[int] = set()
        pending = [(forward, *found) for forward in self._forwarder.live if (found := forward.pending) is not None]
        for forward, lease, sent_s, route in sorted(pending, key=_youngest):
            if self._credit < 1.0:
                return
            slot = lease.slot
            if slot not in reported:
                age_ns = self._full_since_ns(lease, now_ns)
                reported[slot] = None if age_ns is None else now_s - age_ns / 1e9
            at = reported[slot]
            if at is None or sent_s >= at:
                continue
            choice = self._better(slot, route, taken)
            if choice is not None:
                self._credit -= 1.0
                taken.add(choice.lease.slot)
                forward.rescue(choice)

    def _full_since_ns(self, lease: Lease, now_ns: int) -> int | None:
        """The age of the report by which requests wait inside the instance; None: none do, or it could not be told."""
        instance = self._table.find(lease.slot, lease.generation)
        if instance is None or not DIALECTS[instance.engine].stops_on_hang_up:
            return None
        row: list[int] = self._table.snapshot[:, lease.slot].tolist()
        age_ns = now_ns - row[Column.REPORTED_NS]
        return age_ns if row[Column.WAITED] >= FULL_REPORTS and age_ns <= self._table.stale_after_ns else None

    def _better(self, slot: int, route: RouteRequest, taken: set[int]) -> Choice | None:
        """A lease at an idle instance."""
        idle = self._idle(route, taken | {slot})
        return None if idle is None else self._admission.claim(route, *idle)

    def _idle(self, route: RouteRequest, avoid: set[int]) -> tuple[int, int] | None:
        try:
            view = self._table.view(route.role, route.model)
        except PenstockError:
            return None
        broken = self._admission.breaker.open_slots(self._forwarder.clock())
        known = view.trust != Trust.STALE  # silent is not idle
        idle = view.slots[known & (view.load == 0) & (view.in_flight == 0)]
        for slot in idle.tolist():
            if slot in avoid or slot in broken:
                continue
            if self._saturation.room(slot) > 0 and not self._saturation.is_held(slot):
                return slot, view.generation(slot)
        return None


def _youngest(pending: tuple[Forward, Lease, float, RouteRequest]) -> float:
    return -pending[2]
