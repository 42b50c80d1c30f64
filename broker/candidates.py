"""Who may serve a request: instances by role and model, and the load table's columns over them.

Built by `broker.view.TableReader` whenever membership has changed, and kept until it changes again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.table import Column, State
from broker.types import Instance

Vector = NDArray[np.int64]

FIRST: Final = int(Column.TRUST)
_LOAD_COLUMNS: Final = slice(FIRST, Column.IN_FLIGHT_THEN + 1)
"""The columns that a view shows."""
_TRUST: Final = int(Column.TRUST) - FIRST
_RUNNING: Final = int(Column.RUNNING) - FIRST
_WAITING: Final = int(Column.WAITING) - FIRST
_REPORTED_NS: Final = int(Column.REPORTED_NS) - FIRST
_IN_FLIGHT_THEN: Final = int(Column.IN_FLIGHT_THEN) - FIRST
_NEVER: Final = 2**62 - 1
FEW: Final = 16
"""Candidates up to which tuples and lists are made and looked through faster than vectors."""


class Entry(NamedTuple):
    """One registered instance."""

    slot: int
    generation: int
    state: State
    instance: Instance


class Candidates:
    """Slots that may serve one kind of request, sorted by URL, and the snapshot's columns over them."""

    __slots__ = ("_columns", "_report", "_report_until_ns", "_stamp", "any", "generations", "listed", "slots")

    def __init__(self, slots: Vector, generations: Mapping[int, int]) -> None:
        self.slots = slots
        self.slots.setflags(write=False)
        self.listed: tuple[int, ...] = tuple(slots.tolist())
        """The same."""
        self.any = len(slots) > 0
        self.generations = generations
        """By slot; may know more slots than are candidates."""
        self._stamp = -1
        self._columns: Vector = np.empty((0, 0), dtype=np.int64)
        self._report: tuple[Vector, Vector] | None = None
        self._report_until_ns = 0

    @classmethod
    def of(cls, entries: Collection[Entry]) -> Candidates:
        slots = np.array([entry.slot for entry in entries], dtype=np.int64)
        return cls(slots, {entry.slot: entry.generation for entry in entries})

    def without(self, slots: Collection[int]) -> Candidates:
        kept = np.ones(len(self.slots), dtype=np.bool_)
        for slot in slots:
            kept &= self.slots != slot
        return Candidates(self.slots[kept], self.generations)

    def columns(self, snapshot: Vector, stamp: int) -> Vector:
        """All columns of the load that a view shows, from `FIRST` on, kept while `stamp` stands. Read-only."""
        if stamp != self._stamp:
            # All nine at once: 0.7 us for 8 candidates, where six single ones take 3.4; for 1,024 both take 8.
            self._columns = snapshot[_LOAD_COLUMNS].take(self.slots, axis=1)
            self._columns.setflags(write=False)
            self._report = None
            self._stamp = stamp
        return self._columns

    def report(self, snapshot: Vector, stamp: int, now_ns: int, stale_after_ns: int) -> tuple[Vector, Vector]:
        """What the reports that count add to the live counters, and the trust in each report."""
        columns = self.columns(snapshot, stamp)
        if self._report is None or now_ns > self._report_until_ns:
            since_ns = max(now_ns - stale_after_ns, 0)
            if len(self.listed) <= FEW:
                added, trust, oldest_ns = _of_few(columns, since_ns)
            else:
                added, trust, oldest_ns = _of_many(columns, since_ns)
            trust.setflags(write=False)
            self._report = added, trust
            # Until the oldest of the fresh ones is too old; a new report changes the stamp.
            self._report_until_ns = _NEVER if oldest_ns == _NEVER else oldest_ns + stale_after_ns - 1
        return self._report


def _of_many(columns: Vector, since_ns: int) -> tuple[Vector, Vector, int]:
    """What reports add, the trust in them, and when the oldest came of those that came after `since_ns`."""
    reported_ns, running, waiting = columns[_REPORTED_NS], columns[_RUNNING], columns[_WAITING]
    fresh = reported_ns > since_ns
    added: Vector = running + waiting
    added -= columns[_IN_FLIGHT_THEN]
    added *= fresh & (running >= 0) & (waiting >= 0)
    trust: Vector = columns[_TRUST] * fresh  # STALE is 0
    ages = reported_ns[fresh]
    return added, trust, int(np.minimum.reduce(ages)) if len(ages) else _NEVER


def _of_few(columns: Vector, since_ns: int) -> tuple[Vector, Vector, int]:
    """`_of_many` number by number: a dozen numpy calls take longer, and reports nearly always have come in between."""
    rows: list[list[int]] = columns.tolist()
    running, waiting, then, trust = rows[_RUNNING], rows[_WAITING], rows[_IN_FLIGHT_THEN], rows[_TRUST]
    added, trusts, oldest_ns = [], [], _NEVER
    for at, reported_ns in enumerate(rows[_REPORTED_NS]):
        fresh = reported_ns > since_ns
        counts = fresh and running[at] >= 0 and waiting[at] >= 0
        added.append(running[at] + waiting[at] - then[at] if counts else 0)
        trusts.append(trust[at] if fresh else 0)
        if fresh and reported_ns < oldest_ns:
            oldest_ns = reported_ns
    both: Vector = np.array([added, trusts], dtype=np.int64)
    return both[0], both[1], oldest_ns


class Group:
    """The instances of one role, by model."""

    def __init__(self, entries: Collection[Entry]) -> None:
        """`entries` are sorted by URL."""
        self._ready = [entry for entry in entries if entry.state is State.READY]
        self._every = Candidates.of(self._ready)
        self._named: dict[str, list[Entry]] = {}
        for entry in self._ready:
            for name in set(entry.instance.models):
                self._named.setdefault(name, []).append(entry)
        self._by_model: dict[str, Candidates] = {}
        self._unnamed = Candidates.of([entry for entry in self._ready if not entry.instance.models])
        self._away = {name for entry in entries if entry.state is not State.READY for name in entry.instance.models}

    def candidates(self, model: str | None) -> Candidates:
        """Ready instances that name `model`; where none does, those whose models are unknown. May be empty."""
        if model is None:
            return self._every
        found = self._by_model.get(model)
        if found is None:
            named = self._named.get(model)
            if named is None:
                return self._unnamed  # not kept by name: clients may ask for any number of names
            found = self._by_model[model] = Candidates.of(named)
        return found

    def names(self, model: str) -> bool:
        """Whether a ready instance serves it by this name."""
        return model in self._named

    def serves(self, model: str | None) -> bool:
        """Whether an answer may be expected later: nothing is ready, or an instance that is away serves the model."""
        return model is None or not self._ready or model in self._away


def by_url(entry: Entry) -> str:
    """Sort key."""
    return entry.instance.url
