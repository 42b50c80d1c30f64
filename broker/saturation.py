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

_CAPACITY: Final = int(Column.CAPACITY)
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
        row = self._table.row(slot)
        limit = row[_CAPACITY] or self._default
        if limit and self._table.instance(slot).engine is EngineKind.NATIVE:
            return _Limit(limit, _NEVER)
        others, until_ns = 0, _NEVER
        if self._is_fresh(row):
            until_ns = row[Column.REPORTED_NS] + self._table.stale_after_ns
            running, waiting = row[Column.RUNNING], row[Column.WAITING]
            if running >= 0 and waiting >= 0:
                others = max(0, running + waiting - _ours_then(row))
            full = row[Column.KV_PERMILLE] >= FULL_KV_PERMILLE
            if full or (not limit and row[Column.WAITED] >= FULL_REPORTS):
                # As many as it runs: with fewer it would idle until its next report.
                runs = running if running >= 0 else _ours_then(row)
                limit = max(1, min(runs, limit or runs))
        return _Limit(limit - others if limit else UNLIMITED, until_ns)

    def opening(self, slot: int) -> int:
        """The room that waiting requests may be granted. As `room`, but where nothing says how much an instance takes,
        it gets a little more per report: all that wait at once would be far too many."""
        room = self.room(slot)
        if room < UNLIMITED:
            return room
        row: list[int] = self._table.snapshot[:, slot].tolist()
        if not self._is_fresh(row):
            return UNLIMITED
        then = _ours_then(row)
        return max(1, then // STEP) - max(0, self._taken(slot) - then)

    def is_held(self, slot: int) -> bool:
        """Whether requests wait that the instance could serve."""
        return self._queue[slot] != 0  # QueueColumn.HELD is the first

    def _taken(self, slot: int) -> int:
        queue = self._queue
        return queue[self._reserved + slot] + queue[self._lent + slot] + self._table.live_at(slot)

    def _is_fresh(self, row: list[int]) -> bool:
        reported_ns = row[Column.REPORTED_NS]
        return reported_ns > 0 and self._clock() - reported_ns <= self._table.stale_after_ns


def _ours_then(row: list[int]) -> int:
    """Requests that this host knew of at the time of the report."""
    return row[Column.IN_FLIGHT_THEN] + row[Column.LENT_THEN]
