"""What one decision sees of its candidates: vectors, made when asked for, and what was asked for kept for later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from broker.candidates import FEW, FIRST, Candidates, Vector
from broker.table import Column


class Source(Protocol):
    """What a view is read from; `broker.view.TableReader` is the real one."""

    snapshot: Vector
    stamp: int
    stale_after_ns: int

    def live_few(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        """As `live_requests`; of a few."""

    def live_requests(self, slots: Vector) -> Vector:
        """Requests in flight at `slots` from all frontends, now."""

    def live_tokens(self, slots: Vector) -> Vector:
        """Prompt tokens in flight at `slots` from all frontends, now."""

    def now_ns(self) -> int:
        """By the clock of the reports."""


class Seen(NamedTuple):
    """What a decision saw of its candidates: vectors alike; None = it did not look."""

    slots: Vector
    generations: Mapping[int, int]
    """By slot; may know more than the candidates'."""
    in_flight: Vector | None
    """Live at that moment, as `tokens`."""
    tokens: Vector | None
    running: Vector | None
    """As last reported."""
    waiting: Vector | None
    reported_ns: Vector | None
    """When; 0 = never."""
    now_ns: int
    """When it looked at reports; 0 = it did not."""


class View:
    """Vectors over the candidates of one decision, all int64 and sorted alike, by URL; never empty.

    Those that come from reports are read-only and shared with other views; UNKNOWN (-1) = the engine did not say.
    """

    __slots__ = ("_candidates", "_few", "_in_flight", "_now_ns", "_reader", "_reports", "_tokens")

    def __init__(self, reader: Source, candidates: Candidates) -> None:
        self._reader = reader
        self._candidates = candidates
        self._now_ns = 0  # until a report is looked at
        self._few: tuple[int, ...] | None = None  # requests in flight, once they were looked at in this form
        self._in_flight: Vector | None = None
        self._tokens: Vector | None = None
        self._reports: Vector | None = None  # the columns of the load, once one of them was looked at

    def __len__(self) -> int:
        return len(self._candidates.slots)

    @property
    def slots(self) -> Vector:
        return self._candidates.slots

    @property
    def listed(self) -> tuple[int, ...]:
        """`slots`, for who wants some of them: a vector gives a single one slowly."""
        return self._candidates.listed

    def generation(self, slot: int) -> int:
        """Of a candidate; what `broker.lease.take` wants."""
        return self._candidates.generations[slot]

    @property
    def requests(self) -> tuple[int, ...] | Vector:
        """`in_flight`, in the form that is looked through fastest: a tuple of few candidates, a vector of many."""
        few = self._few
        if few is None:
            listed = self._candidates.listed
            if len(listed) > FEW:
                return self.in_flight
            few = self._few = self._reader.live_few(listed)
        return few

    @property
    def in_flight(self) -> Vector:
        """Requests in flight from all frontends, as of the first use in this view."""
        if self._in_flight is None:
            if self._few is None:
                self._in_flight = self._reader.live_requests(self._candidates.slots)
            else:
                self._in_flight = np.array(self._few, dtype=np.int64)
        return self._in_flight

    @property
    def tokens(self) -> Vector:
        """Prompt tokens in flight from all frontends, as of the first use in this view."""
        if self._tokens is None:
            self._tokens = self._reader.live_tokens(self._candidates.slots)
        return self._tokens

    @property
    def running(self) -> Vector:
        return self._column(Column.RUNNING)

    @property
    def waiting(self) -> Vector:
        return self._column(Column.WAITING)

    @property
    def waiting_tokens(self) -> Vector:
        return self._column(Column.WAITING_TOKENS)

    @property
    def kv_permille(self) -> Vector:
        return self._column(Column.KV_PERMILLE)

    @property
    def capacity(self) -> Vector:
        """Requests at once; 0 = unknown."""
        return self._column(Column.CAPACITY)

    @property
    def age_ns(self) -> Vector:
        """Age of the last report; the time since boot where there is none."""
        reported_ns = self._column(Column.REPORTED_NS)
        age: Vector = self._now_ns - reported_ns
        return age

    @property
    def trust(self) -> Vector:
        """`Trust` of the last report; STALE also when it is too old, or there is none."""
        return self._report()[1]

    @property
    def load(self) -> Vector:
        """Requests at the instance: what it reported, and what the live counters have moved since.

        Where there is no report to believe, the live counters alone: unknown is not idle.
        """
        load: Vector = self._report()[0] + self.in_flight
        np.maximum(load, 0, out=load)
        return load

    @property
    def seen(self) -> Seen:
        """What the decision has looked at, and nothing else. To be asked for at any time."""
        reports, tokens = self._reports, self._tokens
        in_flight = None if self._few is None and self._in_flight is None else self.in_flight
        running = waiting = reported_ns = None
        if reports is not None:
            running, waiting = reports[Column.RUNNING - FIRST], reports[Column.WAITING - FIRST]
            reported_ns = reports[Column.REPORTED_NS - FIRST]
        generations = self._candidates.generations
        return Seen(self.slots, generations, in_flight, tokens, running, waiting, reported_ns, self._now_ns)

    def _report(self) -> tuple[Vector, Vector]:
        reader = self._reader
        self._look()
        return self._candidates.report(reader.snapshot, reader.stamp, self._now_ns, reader.stale_after_ns)

    def _column(self, column: int) -> Vector:
        cells: Vector = self._look()[column - FIRST]
        return cells

    def _look(self) -> Vector:
        """At the reports."""
        reader = self._reader
        if self._reports is None:
            self._now_ns = reader.now_ns()
        self._reports = self._candidates.columns(reader.snapshot, reader.stamp)
        return self._reports

    def __repr__(self) -> str:
        return f"View(slots={self.slots.tolist()})"
