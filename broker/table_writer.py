"""The writer's half of the segment `load` (`broker.table`): who has which slot, and what is known of them.

A slot's life:

    FREE --admit--> READY <--set_state--> DRAINING, DOWN --remove--> RESTING --reclaim--> FREE
                                                                     (nothing in flight for the rest time)

Why a removed slot rests: a frontend chose it an instant before, and its counter may rise an instant after. The
frontend stores its counter, fences, and then looks whether slot and generation still stand (`broker.lease`); the
scheduler stores RESTING, fences, and then looks whether the counters are level. One of the two sees the other.

After a kill at any store the next scheduler finds the row odd. `BLOB_BYTES` is 0 from before the first byte of a blob
is written until after the last, so a torn row with BLOB_BYTES > 0 has a whole blob and is rebuilt from it.
"""

from __future__ import annotations

import heapq
import os
from pathlib import Path
from typing import Final

from broker.config import Config
from broker.counters import CountersReader, attach_counters
from broker.errors import UNDECODABLE, TableFull
from broker.table import (
    HOLDS_INSTANCE,
    LOAD,
    MAX_BLOB_BYTES,
    UNKNOWN,
    Cell,
    Column,
    QueueColumn,
    State,
    decode,
    encode,
    load_layout,
)
from broker.types import Instance, LoadReport, Trust
from shm import fence
from shm.segment import Segment
from shm.seqlock import RowWriter

# A report is written every few milliseconds, and enums are slow to hash.
_TRUST: Final = int(Column.TRUST)
_RUNNING: Final = int(Column.RUNNING)
_WAITING: Final = int(Column.WAITING)
_WAITING_TOKENS: Final = int(Column.WAITING_TOKENS)
_KV_PERMILLE: Final = int(Column.KV_PERMILLE)
_CAPACITY: Final = int(Column.CAPACITY)
_REPORTED_NS: Final = int(Column.REPORTED_NS)
_IN_FLIGHT_THEN: Final = int(Column.IN_FLIGHT_THEN)
_TOKENS_THEN: Final = int(Column.TOKENS_THEN)
_WAITED: Final = int(Column.WAITED)
_LENT_THEN: Final = int(Column.LENT_THEN)
_LENT: Final = int(QueueColumn.LENT)

_NO_REPORT: dict[int, int] = {
    Column.TRUST: int(Trust.STALE),
    Column.RUNNING: UNKNOWN,
    Column.WAITING: UNKNOWN,
    Column.WAITING_TOKENS: UNKNOWN,
    Column.KV_PERMILLE: UNKNOWN,
    Column.REPORTED_NS: 0,
    Column.IN_FLIGHT_THEN: 0,
    Column.TOKENS_THEN: 0,
    Column.WAITED: 0,
    Column.LENT_THEN: 0,
}


class TableWriter:
    """The scheduler's half; every method is a few stores, no I/O. One process at a time, `take_over` first."""

    def __init__(self, load: Segment, counters: Segment, rest_ns: int) -> None:
        self._segment = load
        self._counters_segment = counters
        self._rest_ns = rest_ns
        self.cells = self._cells = load.cells("cells")
        """By Cell; CLUSTER and HOSTS are the cluster member's."""
        self.events = load.cells("events")
        """By SchedulerEvent; the scheduler counts here directly."""
        self.queue = load.cells("queue")
        """By QueueColumn and slot; the admission queue writes here directly."""
        version = self._cells[Cell.VERSION : Cell.VERSION + 1]
        used = self._cells[Cell.USED : Cell.USED + 1]
        self._rows = RowWriter(load.cells("sequence"), load.cells("values"), version, used)
        self._base = load.cells("base")
        self._blobs = load.bytes("blobs")
        self._counters = CountersReader(counters)
        self.slots = load.layout.block("sequence").shape[0]
        self._free: list[int] = []  # a heap: the lowest slot is used first, which keeps `USED` low
        self._resting: set[int] = set()

    @classmethod
    def attach(cls, run_dir: Path, config: Config) -> TableWriter:
        """Map the run's segments. Raises SegmentError."""
        load = Segment.attach(run_dir / LOAD, load_layout(config.shm.slots), writable=True)
        return cls(load, attach_counters(run_dir, config), int(config.shm.rest_secs * 1e9))

    # -- succession ----------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self._segment.epoch

    def take_over(self) -> list[tuple[int, Instance, State]]:
        """Become the writer: repair torn rows, bump the epoch, return what is registered."""
        for slot in self._rows.torn():
            self._repair(slot)
        survivors = []
        for slot in range(self.slots):
            state = State(self._rows.load(slot, Column.STATE))
            if state in HOLDS_INSTANCE:
                instance = self._instance(slot)
                if instance is not None:
                    survivors.append((slot, instance, state))
                    continue
                self._vacate(slot)
                state = State.RESTING
            if state is State.RESTING:
                self._resting.add(slot)
            else:
                heapq.heappush(self._free, slot)
        # The dead one may have stopped just before it told the readers of a whole row.
        self._cells[Cell.VERSION] += 1
        self._cells[Cell.MEMBERSHIP] += 1
        self._segment.take_over(os.getpid())
        return survivors

    def _repair(self, slot: int) -> None:
        state = State(self._rows.load(slot, Column.STATE))
        instance = self._instance(slot) if state in HOLDS_INSTANCE else None
        if instance is not None:
            self._rows.write(slot, {**_NO_REPORT, Column.ROLE: instance.role, Column.CAPACITY: instance.capacity})
        elif state is State.FREE:
            self._rows.write(slot, {Column.BLOB_BYTES: 0})
        else:
            self._vacate(slot)

    def _instance(self, slot: int) -> Instance | None:
        size = self._rows.load(slot, Column.BLOB_BYTES)
        if not 0 < size <= MAX_BLOB_BYTES:
            return None
        start = slot * MAX_BLOB_BYTES
        try:
            return decode(self._blobs[start : start + size])
        except UNDECODABLE:
            return None

    # -- membership ----------------------------------------------------------------------------------------

    def admit(self, instance: Instance, now_ns: int) -> int:
        """Give a new instance a slot, READY at once. Raises TableFull, MetadataTooLarge."""
        blob = encode(instance)
        if not self._free:
            self.reclaim(now_ns)
        if not self._free:
            resting = f", {len(self._resting)} of them resting (shm.rest-secs)" if self._resting else ""
            raise TableFull(f"all {self.slots} slots of the load table (shm.slots) are in use{resting}")
        slot = heapq.heappop(self._free)
        for queued in QueueColumn:
            self.queue[queued * self.slots + slot] = 0
        changes: dict[int, int] = {
            Column.BLOB_BYTES: 0,
            **_NO_REPORT,
            Column.ROLE: int(instance.role),
            Column.CAPACITY: instance.capacity,
            Column.IDLE_SINCE_NS: 0,
            Column.GENERATION: self._rows.load(slot, Column.GENERATION) + 1,
            Column.STATE: int(State.READY),
        }
        self._describe(slot, blob, changes)
        return slot

    def describe(self, slot: int, instance: Instance) -> None:
        """Replace what is said of the instance in `slot`, as the same generation. Raises MetadataTooLarge."""
        changes: dict[int, int] = {
            Column.BLOB_BYTES: 0,
            Column.ROLE: int(instance.role),
            Column.CAPACITY: instance.capacity,
        }
        self._describe(slot, encode(instance), changes)

    def _describe(self, slot: int, blob: bytes, changes: dict[int, int]) -> None:
        def store_blob() -> None:
            start = slot * MAX_BLOB_BYTES
            self._blobs[start : start + len(blob)] = blob
            self._rows.store(slot, Column.BLOB_VERSION, self._rows.load(slot, Column.BLOB_VERSION) + 1)
            self._rows.store(slot, Column.BLOB_BYTES, len(blob))

        self._rows.write(slot, changes, store_blob)
        self._cells[Cell.MEMBERSHIP] += 1

    def state(self, slot: int) -> State:
        return State(self._rows.load(slot, Column.STATE))

    def set_state(self, slot: int, state: State) -> None:
        """READY, DRAINING or DOWN for an instance that has the slot."""
        if state not in HOLDS_INSTANCE or self.state(slot) not in HOLDS_INSTANCE:
            raise ValueError(f"slot {slot} cannot go from {self.state(slot).name} to {state.name}")
        self._rows.write(slot, {Column.STATE: int(state)})
        self._cells[Cell.MEMBERSHIP] += 1

    def remove(self, slot: int, now_ns: int) -> None:
        """Take the instance out; its slot rests. What is in flight there goes on."""
        if self.state(slot) not in HOLDS_INSTANCE:
            raise ValueError(f"slot {slot} is {self.state(slot).name}, nothing to remove")
        self._vacate(slot)
        self._resting.add(slot)
        self._rest(slot, now_ns)

    def _vacate(self, slot: int) -> None:
        self._rows.write(
            slot, {Column.STATE: int(State.RESTING), Column.BLOB_BYTES: 0, Column.IDLE_SINCE_NS: 0, **_NO_REPORT}
        )
        self._cells[Cell.MEMBERSHIP] += 1

    def reclaim(self, now_ns: int) -> list[int]:
        """Free the slots that have rested long enough; called every second or so. Returns them."""
        return [slot for slot in tuple(self._resting) if self._rest(slot, now_ns)]

    def _rest(self, slot: int, now_ns: int) -> bool:
        """Look after a resting slot; True when it became FREE."""
        fence.full()  # RESTING was stored before; see the top of this file
        sums = self._counters.settled(slot)
        idle_since = self._rows.load(slot, Column.IDLE_SINCE_NS)
        if sums is None:
            if idle_since:
                self._rows.write(slot, {Column.IDLE_SINCE_NS: 0})
            return False
        if not idle_since:
            idle_since = now_ns
            self._rows.write(slot, {Column.IDLE_SINCE_NS: now_ns})
        if now_ns - idle_since < self._rest_ns:
            return False

        def store_base() -> None:
            for column, total in enumerate(sums):
                self._base[column * self.slots + slot] = total

        self._rows.write(slot, {Column.STATE: int(State.FREE), Column.IDLE_SINCE_NS: 0}, store_base)
        self._resting.remove(slot)
        heapq.heappush(self._free, slot)
        return True

    # -- load ----------------------------------------------------------------------------------------------

    def report(self, slot: int, report: LoadReport, now_ns: int) -> None:
        """Apply what the instance in `slot` said of itself, as of `now_ns`."""
        in_flight, tokens = self._counters.in_flight(slot)
        changes: dict[int, int] = {
            _TRUST: int(report.trust),
            _RUNNING: _said(report.running),
            _WAITING: _said(report.waiting),
            _WAITING_TOKENS: _said(report.waiting_tokens),
            _KV_PERMILLE: _said(report.kv_permille),
            _REPORTED_NS: now_ns,
            _IN_FLIGHT_THEN: in_flight,
            _TOKENS_THEN: tokens,
            _WAITED: self._rows.load(slot, _WAITED) + 1 if report.waiting else 0,
            _LENT_THEN: self.queue[_LENT * self.slots + slot],
        }
        if report.capacity is not None:
            changes[_CAPACITY] = report.capacity
        self._rows.write(slot, changes)

    # -- the scheduler itself ------------------------------------------------------------------------------

    def beat(self, now_ns: int) -> None:
        """Say that the scheduler is alive; every BEAT_S."""
        self._cells[Cell.BEAT_NS] = now_ns

    def mark_ready(self) -> None:
        """Say that the configured instances have had their first chance. Stays so in later epochs."""
        self._cells[Cell.READY] = 1

    def close(self) -> None:
        self._segment.close()
        self._counters_segment.close()


def _said(value: int | None) -> int:
    return UNKNOWN if value is None else value
