"""How many more requests an instance should get now: the one rule, for frontends that choose and for the scheduler
that grants.

    room = limit - others - in flight - reserved - lent

    limit      the capacity it registered or reported (a native engine's credit), else `scheduler.instance-capacity`.
               Nothing known: none, until its reports show that it is full. Then, and for HTTP engines whose KV cache is
               full whatever their capacity, the requests that it runs, so that each that ends makes room for one; at
               least 1, as an instance with nothing to do is never full
    others     HTTP engines: what they report beyond what this host had sent, and lent of them, then
    in flight  from all frontends of this host, live
    reserved   granted to waiting requests that have not taken their lease yet
    lent       places that other hosts have, or are offered (`broker.cluster`)

An engine shows that it is full by requests that wait in two reports running, or by 95 % of its KV cache in use; reports
that are too old show nothing. One that has shown it, and does no longer, opens step by step: see `opening`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from broker.table import Column, QueueColumn
from broker.types import EngineKind
from broker.view import TableReader
from shm.cells import quick

UNLIMITED: Final = 1 << 60
FULL_KV_PERMILLE = 950
FULL_REPORTS = 2
STEP = 4
"""An instance of unknown capacity may grow by a fourth of what it had at its last report."""

# Looked at for every request after a report, and names of enums are looked up one by one.
_CAPACITY: Final = int(Column.CAPACITY)
_IN_FLIGHT_THEN: Final = int(Column.IN_FLIGHT_THEN)
_KV_PERMILLE: Final = int(Column.KV_PERMILLE)
_LENT_THEN: Final = int(Column.LENT_THEN)
_REPORTED_NS: Final = int(Column.REPORTED_NS)
_RUNNING: Final = int(Column.RUNNING)
_WAITED: Final = int(Column.WAITED)
_WAITING: Final = int(Column.WAITING)
_NATIVE: Final = EngineKind.NATIVE
_NEVER: Final = 1 << 61


class _Limit:
    """Of one instance, without what others have there; as its last report has it."""

    __slots__ = ("requests", "until_ns")

    def __init__(self, requests: int, until_ns: int) -> None:
        self.requests = requests
        self.until_ns = until_ns
        """When the report is too old."""


class Saturation:
    """Reads the table; every call is for now. Owned by one process."""

    def __init__(
        self, table: TableReader, instance_capacity: int, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._table = table
        self._default = instance_capacity
        self._clock = clock
        slots = len(table.queue) // len(QueueColumn)
        self._queue = quick(table.queue)
        self._reserved = slots * QueueColumn.RESERVED
        self._lent = slots * QueueColumn.LENT
        self._limits: dict[int, _Limit] = {}
        self._stamp = -1

    def room(self, slot: int) -> int:
        """Of a candidate of the last view; UNLIMITED, or at most 0 when it is saturated."""
        if self._table.stamp != self._stamp:
            self._limits.clear()
            self._stamp = self._table.stamp
        limit = self._limits.get(slot)
        if limit is None or (limit.until_ns != _NEVER and self._clock() > limit.until_ns):
            limit = self._limits[slot] = self._limit(slot)
        if limit.requests == UNLIMITED:
            return UNLIMITED
        return limit.requests - self._taken(slot)

    def _limit(self, slot: int) -> _Limit:
        table = self._table
        limit = table.cell(_CAPACITY, slot) or self._default
        if limit and table.instance(slot).engine is _NATIVE:
            return _Limit(limit, _NEVER)
        others, until_ns, reported_ns = 0, _NEVER, table.cell(_REPORTED_NS, slot)
        if self._is_fresh(reported_ns):
            until_ns = reported_ns + table.stale_after_ns
            running, waiting = table.cell(_RUNNING, slot), table.cell(_WAITING, slot)
            if running >= 0 and waiting >= 0:
                others = max(0, running + waiting - self._ours_then(slot))
            full = table.cell(_KV_PERMILLE, slot) >= FULL_KV_PERMILLE
            if full or (not limit and table.cell(_WAITED, slot) >= FULL_REPORTS):
                # As many as it runs: with fewer it would idle until its next report.
                runs = running if running >= 0 else self._ours_then(slot)
                limit = max(1, min(runs, limit or runs))
        return _Limit(limit - others if limit else UNLIMITED, until_ns)

    def opening(self, slot: int) -> int:
        """The room that waiting requests may be granted. As `room`, but where nothing says how much an instance takes,
        it gets a little more per report: all that wait at once would be far too many."""
        room = self.room(slot)
        if room < UNLIMITED:
            return room
        if not self._is_fresh(self._table.cell(_REPORTED_NS, slot)):
            return UNLIMITED
        then = self._ours_then(slot)
        return max(1, then // STEP) - max(0, self._taken(slot) - then)

    def is_held(self, slot: int) -> bool:
        """Whether requests wait that the instance could serve."""
        return self._queue[slot] != 0  # QueueColumn.HELD is the first

    def _taken(self, slot: int) -> int:
        queue = self._queue
        return queue[self._reserved + slot] + queue[self._lent + slot] + self._table.live_at(slot)

    def _is_fresh(self, reported_ns: int) -> bool:
        return reported_ns > 0 and self._clock() - reported_ns <= self._table.stale_after_ns

    def _ours_then(self, slot: int) -> int:
        """Requests that this host knew of at the time of the report."""
        return self._table.cell(_IN_FLIGHT_THEN, slot) + self._table.cell(_LENT_THEN, slot)
