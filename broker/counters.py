"""The segment `counters`: what each frontend has started and finished, and who the frontends are.

    block    shape                               writer
    slots    (frontends, CounterColumn, slots)   each frontend its own row (on pages of its own)
    totals   (frontends, totals)                 each frontend its own row (on pages of its own)
    roster   (frontends, RosterColumn)           the supervisor
    cells    (CountersCell,)                     the supervisor

A frontend's life in a row: the supervisor enters it in the roster, the frontend counts, dies or leaves, is reaped,
and its row is settled (`Roster.settle`). The next frontend of that row goes on counting in the same cells.

Order of a frontend's stores: STARTED is the first of a take, FINISHED the last of a close. Whoever loads FINISHED
first, then the other columns, then STARTED, and finds the two equal, has seen a moment with nothing in flight and
every other column at rest. The scheduler rests its reuse of slots on that.
"""

from __future__ import annotations

import os
from array import array
from enum import IntEnum
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from broker.config import Config
from shm.cells import CounterRow, add, gauges, quick, settle
from shm.segment import Block, Layout, Segment

COUNTERS = "counters"
"""File name in the run directory."""

_ANSWERED = (200, 201, 204, 302, 304)
_REFUSED = (400, 401, 403, 404, 405, 408, 409, 413, 418, 422, 429, 499)
_FAILED = (500, 501, 502, 503, 504)
STATUSES = _ANSWERED + _REFUSED + _FAILED
"""Statuses counted apart, per instance."""


class CounterColumn(IntEnum):
    """Per frontend and slot. Counters only rise."""

    FINISHED = 0
    STARTED = 1
    TOKENS_FINISHED = 2
    TOKENS_STARTED = 3
    ABANDONED = 4  # in flight when their frontend died
    TOKENS_ABANDONED = 5
    WITHDRAWN = 6  # takes that found the slot changed: in STARTED and FINISHED, but never requests
    TOKENS_WITHDRAWN = 7
    STATUS_200 = 8
    STATUS_201 = 9
    STATUS_204 = 10
    STATUS_302 = 11
    STATUS_304 = 12
    STATUS_400 = 13
    STATUS_401 = 14
    STATUS_403 = 15
    STATUS_404 = 16
    STATUS_405 = 17
    STATUS_408 = 18
    STATUS_409 = 19
    STATUS_413 = 20
    STATUS_418 = 21
    STATUS_422 = 22
    STATUS_429 = 23
    STATUS_499 = 24
    STATUS_500 = 25
    STATUS_501 = 26
    STATUS_502 = 27
    STATUS_503 = 28
    STATUS_504 = 29
    STATUS_OTHER = 30
    RETRIED = 31  # failed before the first byte and were sent again
    BROKEN = 32  # ended by an engine's failure after the first byte
    GONE = 33  # ended because the client left
    RESCUED = 34  # taken back before the first byte and sent to an idle instance


class TotalColumn(IntEnum):
    """Per frontend. What is open is OPENED - CLOSED; settling closes what a dead frontend had open."""

    RESPONSES_2XX = 0
    RESPONSES_3XX = 1
    RESPONSES_4XX = 2
    RESPONSES_5XX = 3
    REJECTED = 4  # bad requests, nothing forwarded
    NO_INSTANCE = 5
    MODEL_NOT_FOUND = 6
    CONNECTIONS_OPENED = 7
    CONNECTIONS_CLOSED = 8
    CONNECTIONS_ABANDONED = 9
    STREAMS_OPENED = 10
    STREAMS_CLOSED = 11
    STREAMS_ABANDONED = 12
    QUEUED = 13  # requests that found every candidate saturated and waited for room
    QUEUE_FULL = 14
    QUEUE_TIMEOUT = 15
    SESSION_CHOICES = 16  # by a policy that looks prompts up, for a session
    SESSION_REPEATS = 17  # of those: where the session's last one was
    NOTICES_LOST = 18  # for the prefix index; the scheduler did not take them in time
    FRAMES_DROPPED = 19  # of native engines: malformed, or of another life


class Histogram(IntEnum):
    """Times counted in buckets, per frontend."""

    FIRST_TOKEN = 0
    DURATION = 1
    QUEUE_WAIT = 2  # of the requests that waited for room


BOUNDS_S: Final[tuple[float, ...]] = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    *(2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Upper bounds of the buckets; one more takes the rest, and one column the sum in microseconds."""

_BUCKETS: Final = len(BOUNDS_S) + 1
TOTALS = (
    *(column.name for column in TotalColumn),
    *(
        f"{histogram.name}_{edge}"
        for histogram in Histogram
        for edge in (*(f"{bound:g}" for bound in BOUNDS_S), "INF", "SUM_US")
    ),
)


class RosterColumn(IntEnum):
    PID = 0
    STATE = 1
    LIFE = 2  # how many frontends this row has had


class RosterState(IntEnum):
    EMPTY = 0
    LIVE = 1
    LEAVING = 2  # takes no more connections; ends with its last stream


class CountersCell(IntEnum):
    ROWS = 0  # rows below it have ever lived: what sums run over, as a settled row adds 0 to what is in flight


_OUTCOMES: Final = tuple(
    [CounterColumn[f"STATUS_{status}"] if status in STATUSES else CounterColumn.STATUS_OTHER for status in range(600)]
)
"""By status: a list is looked into in a third of the time that a dict takes."""


def outcome(status: int) -> CounterColumn:
    """The column that counts answers with this HTTP status."""
    return _OUTCOMES[status] if 0 <= status < len(_OUTCOMES) else CounterColumn.STATUS_OTHER


def histogram_column(histogram: Histogram) -> int:
    """The first bucket's column; `len(BOUNDS_S) + 1` buckets follow one another, then the sum."""
    return _HISTOGRAMS + histogram * (_BUCKETS + 1)


_HISTOGRAMS: Final = len(TotalColumn)


def counters_layout(frontends: int, slots: int) -> Layout:
    labels = tuple(column.name for column in CounterColumn)
    return Layout(
        COUNTERS,
        1,
        [
            Block("cells", (len(CountersCell),), labels=tuple(cell.name for cell in CountersCell)),
            Block(
                "roster",
                (frontends, len(RosterColumn)),
                labels=tuple(column.name for column in RosterColumn),
                labelled=1,
            ),
            Block("totals", (frontends, len(TOTALS)), paged=True, labels=TOTALS, labelled=1),
            Block("slots", (frontends, len(CounterColumn), slots), paged=True, labels=labels, labelled=1),
        ],
    )


def create_counters(run_dir: Path, config: Config) -> Segment:
    """Make the segment in the run directory, for the supervisor's `Roster`. Raises SegmentError."""
    segment = Segment.create(run_dir / COUNTERS, counters_layout(config.shm.frontends, config.shm.slots))
    segment.take_over(os.getpid())
    return segment


def attach_counters(run_dir: Path, config: Config) -> Segment:
    """The segment as everyone but the supervisor sees it: read-only. Raises SegmentError."""
    return Segment.attach(run_dir / COUNTERS, counters_layout(config.shm.frontends, config.shm.slots))


class FrontendCounters(CounterRow):
    """Frontend `index`'s own counters: the only shared memory that a frontend writes."""

    __slots__ = ("index", "totals")

    def __init__(self, segment: Segment, index: int) -> None:
        """`segment` may be mapped read-only; row `index` of it becomes writable for this object."""
        super().__init__(quick(segment.row_cells("slots", index)), segment.layout.block("slots").shape[2])
        self.totals = quick(segment.row_cells("totals", index))
        self.index = index

    def count(self, column: TotalColumn, amount: int = 1) -> None:
        add(self.totals, column, amount)

    def close(self) -> None:
        super().close()
        self.totals.release()

    def observe(self, histogram: Histogram, seconds: float) -> None:
        number: int = histogram
        bucket = _HISTOGRAMS + number * (_BUCKETS + 1)
        rest = bucket + _BUCKETS
        for bound in BOUNDS_S:  # most are among the first, and this takes no call
            if seconds <= bound:
                break
            bucket += 1
        add(self.totals, bucket, 1, rest, int(seconds * 1e6))


# numpy is slow to take an enum.
_FINISHED: Final = int(CounterColumn.FINISHED)
_STARTED: Final = int(CounterColumn.STARTED)
_TOKENS_FINISHED: Final = int(CounterColumn.TOKENS_FINISHED)
_TOKENS_STARTED: Final = int(CounterColumn.TOKENS_STARTED)


class CountersReader:
    """Sums over the rows of all frontends that ever lived."""

    def __init__(self, segment: Segment) -> None:
        self._slots = segment.array("slots")
        self._totals = segment.array("totals")
        self._roster = segment.array("roster")
        self._cells = segment.cells("cells")
        used = memoryview(array("q", [self._slots.shape[2]]))  # all: only the table knows better
        self._gauges = gauges(self._slots, self._cells[CountersCell.ROWS :], used)

    @property
    def rows(self) -> int:
        count: int = self._cells[CountersCell.ROWS]
        return count

    def in_flight(self, slot: int) -> tuple[int, int]:
        """Requests and prompt tokens in flight at `slot`, now; never negative.

        The smaller of two looks: a process that is put to sleep between the loads of one would count all that began
        until it woke up.
        """
        one = self._gauges.one
        return (
            min(one(_FINISHED, _STARTED, slot), one(_FINISHED, _STARTED, slot)),
            min(one(_TOKENS_FINISHED, _TOKENS_STARTED, slot), one(_TOKENS_FINISHED, _TOKENS_STARTED, slot)),
        )

    def settled(self, slot: int) -> list[int] | None:
        """The sums of every column of `slot`, or None if anything is in flight there."""
        cells = self._slots[: self.rows, :, slot]
        finished = cells[:, CounterColumn.FINISHED].sum()
        sums: list[int] = cells.sum(axis=0).tolist()
        started = cells[:, CounterColumn.STARTED].sum()
        return sums if finished == started else None

    def sums(self, slot: int) -> list[int]:
        """The sums of every column of `slot`; started is loaded after finished."""
        cells = self._slots[: self.rows, :, slot]
        sums: list[int] = cells.sum(axis=0).tolist()
        for column in (CounterColumn.STARTED, CounterColumn.TOKENS_STARTED):
            sums[column] = int(cells[:, column].sum())
        return sums

    def slots(self) -> NDArray[np.int64]:
        """(CounterColumn, slots): every frontend's counters summed. Started is loaded after finished."""
        cells = self._slots[: self.rows]
        sums: NDArray[np.int64] = np.add.reduce(cells, axis=0)
        for column in (CounterColumn.STARTED, CounterColumn.TOKENS_STARTED):
            sums[column] = np.add.reduce(cells[:, column], axis=0)
        return sums

    def totals(self) -> NDArray[np.int64]:
        """Every frontend's totals summed, in the order of `TOTALS`."""
        sums: NDArray[np.int64] = np.add.reduce(self._totals[: self.rows], axis=0)
        return sums

    def live(self) -> list[tuple[int, int]]:
        """(row, pid) of the frontends in the roster."""
        roster = self._roster[: self.rows]
        rows = np.flatnonzero(roster[:, RosterColumn.STATE] == RosterState.LIVE)
        return [(int(row), int(roster[row, RosterColumn.PID])) for row in rows]

    def lives(self) -> list[tuple[int, int]]:
        """(row, life) of the frontends in the roster, those included that take no more connections: what they have goes
        on."""
        roster = self._roster[: self.rows]
        rows = np.flatnonzero(roster[:, RosterColumn.STATE] != RosterState.EMPTY)
        return [(int(row), int(roster[row, RosterColumn.LIFE])) for row in rows]


class Roster:
    """The supervisor's half: which frontend has which row, and the settling of dead ones."""

    def __init__(self, segment: Segment) -> None:
        """`segment` is mapped writable: for settling, the supervisor may write a dead frontend's row."""
        self._roster = segment.array("roster")
        self._cells = segment.cells("cells")
        self._slots = segment.array("slots")
        self._totals = segment.array("totals")

    def free_row(self) -> int | None:
        """The lowest row without a frontend, or None when all are taken."""
        free = np.flatnonzero(self._roster[:, RosterColumn.STATE] == RosterState.EMPTY)
        return int(free[0]) if len(free) else None

    def enter(self, row: int) -> int:
        """Give `row` to a new frontend and let all sums include it, before it is started; returns the row's life."""
        if self._roster[row, RosterColumn.STATE] != RosterState.EMPTY:
            raise ValueError(f"row {row} belongs to pid {self._roster[row, RosterColumn.PID]}")
        self._roster[row, RosterColumn.PID] = 0
        self._roster[row, RosterColumn.LIFE] += 1
        self._roster[row, RosterColumn.STATE] = RosterState.LIVE
        self._cells[CountersCell.ROWS] = max(self._cells[CountersCell.ROWS], row + 1)
        return int(self._roster[row, RosterColumn.LIFE])

    def started(self, row: int, pid: int) -> None:
        """Note the pid of the frontend that has `row`."""
        self._roster[row, RosterColumn.PID] = pid

    def leaves(self, row: int) -> None:
        """The frontend of `row` takes no more connections: the others need not wait for it to take its share."""
        self._roster[row, RosterColumn.STATE] = RosterState.LEAVING

    def settle(self, row: int) -> int:
        """End what a dead frontend had in flight and free its row; returns the requests it abandoned.

        Only after the process has been reaped: one that is merely silent still counts in these cells.
        """
        cells = self._slots[row]
        lost = settle(cells, CounterColumn.STARTED, CounterColumn.FINISHED, CounterColumn.ABANDONED)
        tokens = CounterColumn.TOKENS_STARTED, CounterColumn.TOKENS_FINISHED, CounterColumn.TOKENS_ABANDONED
        settle(cells, *tokens)
        totals = self._totals[row].reshape(-1, 1)
        for kind in ("CONNECTIONS", "STREAMS"):
            settle(totals, *(TotalColumn[f"{kind}_{end}"] for end in ("OPENED", "CLOSED", "ABANDONED")))
        self._roster[row, RosterColumn.STATE] = RosterState.EMPTY
        return lost
