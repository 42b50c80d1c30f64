"""The segment `load`: what is known of each instance, by slot. Its one writer is the scheduler.

    block     shape                    written
    cells     (Cell,)                  one by one
    events    (SchedulerEvent,)        one by one; counters that go on through all lives of the scheduler
    sequence  (slots,)                 odd while a row is being written (`shm.seqlock`)
    values    (Column, slots)          a row inside its odd window
    queue     (QueueColumn, slots)     one by one
    base      (CounterColumn, slots)   inside the odd window in which a generation begins
    blobs     (slots, BLOB_BYTES)      inside an odd window: msgpack of the row's `Instance`

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
from enum import IntEnum
from pathlib import Path

import msgspec

from broker.config import Config
from broker.counters import CounterColumn, CountersReader, attach_counters
from broker.errors import UNDECODABLE, MetadataTooLarge, TableFull
from broker.types import Instance, LoadReport, Trust
from shm import fence
from shm.segment import Block, Layout, Segment
from shm.seqlock import RowWriter

LOAD = "load"
"""File name in the run directory."""
MAX_BLOB_BYTES = 8192
BEAT_S = 0.25
"""The scheduler stores BEAT_NS this often."""
UNKNOWN = -1
"""What an engine did not say."""


class State(IntEnum):
    """Of a slot. Only READY ones are candidates; the first four below RESTING hold an instance or nothing."""

    FREE = 0
    READY = 1
    DRAINING = 2  # serves what it has, gets nothing new
    DOWN = 3  # unhealthy; still registered, still probed
    RESTING = 4  # removed; no instance


HOLDS_INSTANCE = frozenset({State.READY, State.DRAINING, State.DOWN})


class Column(IntEnum):
    """Per slot. Numbers that the engine did not say are UNKNOWN."""

    STATE = 0
    GENERATION = 1  # of the slot's use; stored before the STATE that it belongs to
    ROLE = 2
    TRUST = 3
    RUNNING = 4
    WAITING = 5
    WAITING_TOKENS = 6
    KV_PERMILLE = 7
    CAPACITY = 8  # 0 = unknown
    REPORTED_NS = 9  # CLOCK_MONOTONIC of the last report; 0 = never
    IN_FLIGHT_THEN = 10  # summed live counters when that report was applied
    TOKENS_THEN = 11
    BLOB_VERSION = 12
    BLOB_BYTES = 13
    IDLE_SINCE_NS = 14  # while RESTING: since when nothing has been in flight; 0 = something was
    WAITED = 15  # reports running that said that requests wait
    LENT_THEN = 16  # places lent to other hosts when that report was applied


class QueueColumn(IntEnum):
    """Per slot, cell by cell: what the admission queue (`broker.scheduler.admission`) has to do with the instance."""

    HELD = 0  # 1 while tickets wait that the instance could serve: whoever comes now stands in line behind them
    RESERVED = 1  # granted tickets whose lease is not seen in the counters yet
    TICKETS = 2  # waiting that prefer the instance, and their prompt tokens
    TOKENS = 3
    GRANTED = 4  # since the slot's generation began, as the next two; those returned later included
    STOLEN = 5  # of those granted: from another instance's queue
    ROBBED = 6  # tickets that preferred the instance and were granted to another
    LENT = 7  # places that requests of other hosts have, or are offered
    RETURNED = 8  # of those granted: back in line, as the instance could not be taken; since the generation began
    WAITED_US = 9  # in line, of all those granted; since the generation began


class Cell(IntEnum):
    VERSION = 0  # rises after every row written
    MEMBERSHIP = 1  # rises after every change of a state, generation or blob
    USED = 2  # slots below it have ever been used
    BEAT_NS = 3  # CLOCK_MONOTONIC of the scheduler's last sign of life
    READY = 4  # 1 once the configured instances have had their first chance
    CLUSTER = 5  # `ClusterState`
    HOSTS = 6  # members of the cluster, this one included; 0 = not joined


class ClusterState(IntEnum):
    """Of the global scheduler at this host (`broker.cluster`)."""

    OFF = 0  # `scheduler.name` is local
    JOINED = 1
    AWAY = 2  # Redis cannot be used: the host goes on alone


class SchedulerEvent(IntEnum):
    """What the scheduler counts of itself; only rises."""

    REGISTRATIONS = 0  # answered well, repeated ones included
    REGISTRATIONS_REFUSED = 1
    HEALTH_CHECKS_FAILED = 2
    POLLS_FAILED = 3  # `/metrics` did not answer, or not with load
    FRAMES_DROPPED = 4  # malformed, oversized or foreign
    LOADS_DROPPED = 5  # of instances that are not registered
    LOADS_MISSED = 6  # by the gaps in publishers' sequences
    REPLIES_DROPPED = 7  # the peer was gone, or took no more
    TICKETS_OFFERED = 8  # requests that began to wait, repeated offers not counted
    TICKETS_GRANTED = 9
    TICKETS_STOLEN = 10  # granted to another instance than they preferred
    TICKETS_RETURNED = 11  # granted, and back in line because the instance could not be taken
    TICKETS_WITHDRAWN = 12  # their client left, their time was over, or their frontend died
    TICKETS_REFUSED = 13  # the queue was full, or nobody serves them any more
    NOTICES_APPLIED = 14  # prompts entered into the prefix index
    NOTICES_DROPPED = 15  # for an instance that is gone, or more than could be entered in time
    CLUSTER_OFFERED = 16  # places of ours that were offered to another host
    CLUSTER_LENT = 17  # of those: given back after a request had run there
    CLUSTER_BORROWED = 18  # requests of ours that were granted an instance of another host
    CLUSTER_DECLINED = 19  # offers to us that nobody needed any more
    CLUSTER_RETURNED = 20  # places of ours that were given back, used or not
    CLUSTER_EXPIRED = 21  # places of ours whose lease ran out
    CLUSTER_IGNORED = 22  # records in Redis that are foreign, or of another version
    CLUSTER_ROUND_TRIPS = 23  # to Redis
    CLUSTER_LOST = 24  # times that Redis went away, or forgot us


def load_layout(slots: int) -> Layout:
    counters = tuple(column.name for column in CounterColumn)
    return Layout(
        LOAD,
        1,
        [
            Block("cells", (len(Cell),), labels=tuple(cell.name for cell in Cell)),
            Block("events", (len(SchedulerEvent),), labels=tuple(event.name for event in SchedulerEvent)),
            Block("sequence", (slots,)),
            Block("values", (len(Column), slots), labels=tuple(column.name for column in Column)),
            Block("queue", (len(QueueColumn), slots), labels=tuple(column.name for column in QueueColumn)),
            Block("base", (len(CounterColumn), slots), labels=counters),
            Block("blobs", (slots, MAX_BLOB_BYTES), "B"),
        ],
    )


def create_table(run_dir: Path, config: Config) -> None:
    """Make the segment in the run directory. Raises SegmentError."""
    Segment.create(run_dir / LOAD, load_layout(config.shm.slots)).close()


def encode(instance: Instance) -> bytes:
    """The blob of `instance`. Raises MetadataTooLarge."""
    blob = msgspec.msgpack.encode(instance)
    if len(blob) > MAX_BLOB_BYTES:
        sizes = {"transfer": len(instance.transfer), "models": len(msgspec.msgpack.encode(instance.models))}
        largest = max(sizes, key=lambda name: sizes[name])
        raise MetadataTooLarge(
            f"the metadata of {instance.url} takes {len(blob)} bytes, {sizes[largest]} of them its {largest}; "
            f"{MAX_BLOB_BYTES} is the limit",
            param=largest,
        )
    return blob


_decoder = msgspec.msgpack.Decoder(Instance)
decode = _decoder.decode
"""A blob's `Instance`; raises msgspec.DecodeError."""

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
            Column.TRUST: int(report.trust),
            Column.RUNNING: _said(report.running),
            Column.WAITING: _said(report.waiting),
            Column.WAITING_TOKENS: _said(report.waiting_tokens),
            Column.KV_PERMILLE: _said(report.kv_permille),
            Column.REPORTED_NS: now_ns,
            Column.IN_FLIGHT_THEN: in_flight,
            Column.TOKENS_THEN: tokens,
            Column.WAITED: self._rows.load(slot, Column.WAITED) + 1 if report.waiting else 0,
            Column.LENT_THEN: self.queue[QueueColumn.LENT * self.slots + slot],
        }
        if report.capacity is not None:
            changes[Column.CAPACITY] = report.capacity
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
