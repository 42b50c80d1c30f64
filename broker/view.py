"""The reading half of the load table: candidates, and vectors over them.

    segment `load` ----refresh----> own snapshot --select--> Candidates (kept while MEMBERSHIP stands)
    segment `counters` --window--> live sums                     |
                                        +------------------------+--> View: one decision's vectors, made when asked for

A frontend has one `TableReader` and makes a `View` per decision. A view is for now: nothing may be awaited between
making it and taking a lease on what was picked from it.

What is kept between decisions, and until when:

* the snapshot: while VERSION stands (one load);
* candidates and decoded instances: while MEMBERSHIP stands, and no row or blob was missed because it was being
  written. MEMBERSHIP is loaded before VERSION and stored after it, so a new MEMBERSHIP comes with its rows;
* columns over the candidates: while the snapshot stands;
* live counters: never.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from broker.candidates import Entry, Group, Vector, by_url
from broker.config import Config
from broker.counters import CounterColumn, CountersCell, CountersReader, attach_counters
from broker.errors import UNDECODABLE, ModelNotFound, NoInstance
from broker.table import (
    BEAT_S,
    HOLDS_INSTANCE,
    LOAD,
    MAX_BLOB_BYTES,
    Cell,
    ClusterState,
    Column,
    SchedulerEvent,
    State,
    decode,
    load_layout,
)
from broker.types import Instance, Role
from broker.vectors import View
from shm.cells import gauges, quick
from shm.segment import Segment
from shm.seqlock import RowReader

__all__ = ["Entry", "TableReader", "View"]

_READY: Final = int(State.READY)
_STATES: Final = list(State)
# Names of enums are looked up one by one.
_MEMBERSHIP: Final = int(Cell.MEMBERSHIP)
_FINISHED: Final = int(CounterColumn.FINISHED)
_STARTED: Final = int(CounterColumn.STARTED)
_TOKENS_FINISHED: Final = int(CounterColumn.TOKENS_FINISHED)
_TOKENS_STARTED: Final = int(CounterColumn.TOKENS_STARTED)
_HOLDS: Final = np.array([state in HOLDS_INSTANCE for state in State])
_ALIVE_NS: Final = int(6 * BEAT_S * 1e9)
"""The scheduler counts as alive this long after its last beat."""


class TableReader:
    """A frontend's half of the table. Reads shared memory, never writes it, never waits."""

    def __init__(
        self,
        load: Segment,
        counters: Segment,
        stale_after_ns: int,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._segment = load
        self._counters_segment = counters
        self.stale_after_ns = stale_after_ns
        self.now_ns = clock
        cells = load.cells("cells")
        self._cells = quick(cells)
        self._events = load.cells("events")
        version = cells[Cell.VERSION : Cell.VERSION + 1]
        used = cells[Cell.USED : Cell.USED + 1]
        self._rows = RowReader(load.array("sequence"), load.array("values"), version, used)
        self._live = quick(load.cells("values"))
        self.queue = load.cells("queue")
        """By QueueColumn and slot, live."""
        self._slots = load.layout.block("sequence").shape[0]
        self._base = load.array("base")
        self._blobs = load.bytes("blobs")
        self.counters = CountersReader(counters)
        self._gauges = gauges(counters.array("slots"), counters.cells("cells")[CountersCell.ROWS :], used)
        self.snapshot = self._rows.values
        """(Column, slots) as of the last look."""
        self._own = quick(self.snapshot.reshape(-1).data)  # the same; a single one is several times cheaper
        self.stamp = 0
        """Rises whenever the snapshot changes."""
        self.selections = 0
        """Rises whenever what `entries` gives has changed."""
        self._membership = -1
        self._missed = True
        self._entries: dict[int, Entry] = {}
        self._instances: dict[int, Instance] = {}
        self._decoded: dict[int, tuple[int, int, Instance]] = {}
        self._groups: dict[int, Group] = {}
        self._refused: set[int] = set()

    @classmethod
    def attach(cls, run_dir: Path, config: Config, clock: Callable[[], int] = time.monotonic_ns) -> TableReader:
        """Map the run's segments, read-only. `clock` is CLOCK_MONOTONIC in ns. Raises SegmentError."""
        load = Segment.attach(run_dir / LOAD, load_layout(config.shm.slots))
        stale_after_ns = int(config.manager.stale_after_secs * 1e9)
        return cls(load, attach_counters(run_dir, config), stale_after_ns, clock)

    # -- decisions -----------------------------------------------------------------------------------------

    def view(self, role: Role, model: str | None, *, avoid: Collection[int] = ()) -> View:
        """The candidates for a request, without those in `avoid` unless no others are left.

        Raises NoInstance when no instance of the role (and model) is ready, ModelNotFound when there are ready
        ones, the models of all are known, and nobody registered serves this one.
        """
        self._refresh()
        group = self._groups.get(role)
        if group is None:
            raise NoInstance(f"no {role.name.lower()} instance is ready")
        candidates = group.candidates(model)
        if not candidates.any and not group.serves(model):
            raise ModelNotFound(f"The model `{model}` does not exist", param="model")
        if self._refused:
            candidates = candidates.without(self._refused)
        if not candidates.any:
            which = "" if model is None else f" with the model {model!r}"
            raise NoInstance(f"no {role.name.lower()} instance{which} is ready")
        if avoid:
            others = candidates.without(avoid)
            if others.any:
                candidates = others
        return View(self, candidates)

    def kind(self, role: Role, model: str | None) -> tuple[Role, str | None]:
        """What requests have in common that the same candidates may serve: a name that nobody serves is as good as
        any other such name, here the empty one. Good for `view`."""
        self._refresh()
        group = self._groups.get(role)
        named = model is None or group is None or group.names(model)
        return role, model if named else ""

    def find(self, slot: int, generation: int) -> Instance | None:
        """Who has the slot in this generation, ready or not."""
        self._refresh()
        entry = self._entries.get(slot)
        return entry.instance if entry is not None and entry.generation == generation else None

    def is_open(self, slot: int, generation: int) -> bool:
        """Whether the slot is READY in this generation, in shared memory, now. For `broker.lease.take`."""
        cells = self._live
        slots = self._slots
        return cells[slot] == _READY and cells[slots + slot] == generation  # this order: see broker.lease

    def refuse(self, slot: int) -> None:
        """Leave the slot out until the table changes: its cells contradict the snapshot.

        Without it a scheduler that was stopped in the middle of this row would make every frontend pick the slot
        again and again, as the snapshot keeps the row's previous copy.
        """
        self._refused.add(slot)

    def live_at(self, slot: int) -> int:
        """Requests in flight at `slot` from all frontends, now."""
        return self._gauges.one(_FINISHED, _STARTED, slot)

    def live_few(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        """As `live_requests`; of a few."""
        return self._gauges.few(_FINISHED, _STARTED, slots)

    def live_requests(self, slots: Vector) -> Vector:
        """Requests in flight at `slots` from all frontends, now."""
        requests: Vector = np.empty(len(slots), dtype=np.int64)
        self._gauges.many(_FINISHED, _STARTED, slots, requests)
        return requests

    def live_tokens(self, slots: Vector) -> Vector:
        """Prompt tokens in flight at `slots` from all frontends, now."""
        tokens: Vector = np.empty(len(slots), dtype=np.int64)
        self._gauges.many(_TOKENS_FINISHED, _TOKENS_STARTED, slots, tokens)
        return tokens

    # -- the whole -----------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Every registered instance, sorted by URL."""
        self._refresh()
        return list(self._entries.values())

    def cell(self, column: int, slot: int) -> int:
        """As of the last view."""
        return self._own[column * self._slots + slot]

    def instance(self, slot: int) -> Instance:
        """The instance in `slot` as of the last view. KeyError when there is none."""
        return self._instances[slot]

    def counted(self, entry: Entry) -> list[int] | None:
        """The counters of an instance since its generation began, all frontends summed, by CounterColumn.

        What was withdrawn is left out of STARTED and FINISHED. None when the slot is another's by now, or its row
        is just being written. For metrics, not for decisions.
        """
        slot = entry.slot
        base = self._rows.guarded(slot, lambda: self._read_base(slot, entry.generation))
        if not base:
            return None
        counts = [total - before for total, before in zip(self.counters.sums(slot), base, strict=True)]
        for column in (CounterColumn.STARTED, CounterColumn.FINISHED):
            counts[column] -= counts[CounterColumn.WITHDRAWN]
        for column in (CounterColumn.TOKENS_STARTED, CounterColumn.TOKENS_FINISHED):
            counts[column] -= counts[CounterColumn.TOKENS_WITHDRAWN]
        return counts

    def _read_base(self, slot: int, generation: int) -> list[int]:
        if self._live[Column.GENERATION * self._slots + slot] != generation:
            return []
        base: list[int] = self._base[:, slot].tolist()
        return base

    @property
    def epoch(self) -> int:
        """Which life of the scheduler wrote last."""
        return self._segment.epoch

    def alive(self, now_ns: int) -> bool:
        """Whether the scheduler has given a sign of life lately."""
        beat: int = self._cells[Cell.BEAT_NS]
        return now_ns - beat < _ALIVE_NS

    @property
    def ready(self) -> bool:
        """Whether the configured instances have had their first chance to be registered."""
        return self._cells[Cell.READY] == 1

    @property
    def cluster(self) -> tuple[ClusterState, int]:
        """How this host stands to its cluster, and how many members that has."""
        return ClusterState(self._cells[Cell.CLUSTER]), self._cells[Cell.HOSTS]

    def events(self) -> dict[SchedulerEvent, int]:
        """What the scheduler has counted of itself, in all its lives."""
        return {event: self._events[event] for event in SchedulerEvent}

    def close(self) -> None:
        self._segment.close()
        self._counters_segment.close()

    # -- keeping up ----------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        membership = self._cells[_MEMBERSHIP]
        changed = self._rows.refresh()
        if changed:
            self.stamp += 1
            self._refused.clear()
        if membership != self._membership or (self._missed and changed):
            self._select()
            self._membership = membership

    def _select(self) -> None:
        """Sort the snapshot's instances into candidates."""
        self.selections += 1
        self._missed = not self._rows.complete
        self._entries, self._instances = {}, {}
        roles: dict[int, list[Entry]] = {}
        for entry in sorted(self._found(), key=by_url):
            self._entries[entry.slot] = entry
            self._instances[entry.slot] = entry.instance
            roles.setdefault(entry.instance.role, []).append(entry)
        self._groups = {role: Group(entries) for role, entries in roles.items()}
        self._decoded = {slot: kept for slot, kept in self._decoded.items() if slot in self._entries}

    def _found(self) -> Iterator[Entry]:
        """The instances in the snapshot that can be decoded."""
        held = np.flatnonzero(_HOLDS[self.snapshot[Column.STATE]])
        columns = Column.STATE, Column.GENERATION, Column.BLOB_VERSION
        rows = zip(held.tolist(), *(self.snapshot[column, held].tolist() for column in columns), strict=True)
        for slot, state, generation, version in rows:
            instance = self._decode(slot, generation, version)
            if instance is None:
                self._missed = True
            else:
                yield Entry(slot, generation, _STATES[state], instance)

    def _decode(self, slot: int, generation: int, version: int) -> Instance | None:
        """The instance of the snapshot's row, or None if it has changed since and there is no earlier decoding."""
        kept = self._decoded.get(slot)
        if kept is not None and kept[:2] == (generation, version):
            return kept[2]
        blob = self._rows.guarded(slot, lambda: self._read_blob(slot, generation, version))
        if not blob:
            return kept[2] if kept is not None and kept[0] == generation else None
        try:
            instance = decode(blob)
        except UNDECODABLE:
            return None
        self._decoded[slot] = generation, version, instance
        return instance

    def _read_blob(self, slot: int, generation: int, version: int) -> bytes:
        cells, slots = self._live, self._slots
        if (
            cells[Column.GENERATION * slots + slot] != generation
            or cells[Column.BLOB_VERSION * slots + slot] != version
        ):
            return b""
        start = slot * MAX_BLOB_BYTES
        return bytes(self._blobs[start : start + cells[Column.BLOB_BYTES * slots + slot]])
