"""A lease: one request's claim on one instance. Closing it is the only way its load goes down.

    frontend (take)                                scheduler (remove, reclaim)
    1  STARTED += 1            own cell            1  STATE := RESTING
    2  fence                                       2  fence
    3  load STATE, GENERATION of the slot          3  load the counters: level?
    4  still READY and ours? else give it back     4  level and rested? then the slot may be used again

Store, fence, load on both sides (Dekker): it cannot be that the frontend loads the old state *and* the scheduler loads
the old counter. Without a fence: (1) the frontend's store waits in its store buffer, (2) it loads READY, (3) the
scheduler stores RESTING and finds the counters level, (4) the slot goes to another instance, and the request is
counted, and its answer accounted, there. STATE is loaded before GENERATION, and stored after it: a READY that
belongs to a later generation is seen together with that generation.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from broker.counters import CounterColumn
from broker.view import TableReader
from shm.cells import CounterRow, add
from shm.fence import full

_STARTED: Final = int(CounterColumn.STARTED)
_FINISHED: Final = int(CounterColumn.FINISHED)
_TOKENS_STARTED: Final = int(CounterColumn.TOKENS_STARTED)
_TOKENS_FINISHED: Final = int(CounterColumn.TOKENS_FINISHED)
_WITHDRAWN: Final = int(CounterColumn.WITHDRAWN)
_TOKENS_WITHDRAWN: Final = int(CounterColumn.TOKENS_WITHDRAWN)


class Lease:
    """Held by whoever streams the answer. Belongs to one thread, like the counters it moves."""

    def __init__(self, row: CounterRow, slot: int, generation: int, tokens: int) -> None:
        self._row = row
        self.slot = slot
        self.generation = generation
        self.tokens = tokens
        """Prompt tokens not released yet."""
        self.closed = False
        self.counts_prompt = False
        """The tokens are released when the answer begins, else with the lease."""
        self.on_close: Callable[[int], None] | None = None
        """Hears of the slot as soon as the lease no longer counts there."""

    def count(self, column: CounterColumn) -> None:
        """Count an outcome at this instance, while the lease is held: later the slot may be another's."""
        if self.closed:
            raise ValueError(f"{self!r} counts nothing any more")
        add(self._row.cells, column * self._row.width + self.slot, 1)

    def finish_tokens(self) -> None:
        """Release the prompt tokens before the end: the prompt has been processed. Idempotent."""
        if self.tokens:
            add(self._row.cells, _TOKENS_FINISHED * self._row.width + self.slot, self.tokens)
            self.tokens = 0

    def answered(self) -> None:
        """The answer begins. Idempotent."""
        if self.counts_prompt:
            self.finish_tokens()

    def close(self, outcome: CounterColumn | None = None) -> None:
        """The request has ended, as `outcome` says. Idempotent: only the first call counts."""
        if self.closed:
            return
        cells, width, slot = self._row.cells, self._row.width, self.slot
        tokens, self.tokens = self.tokens, 0
        self.closed = True
        # FINISHED last: until then the scheduler keeps the slot for this generation.
        if outcome is None:
            add(cells, _TOKENS_FINISHED * width + slot, tokens, _FINISHED * width + slot, 1)
        else:
            column: int = outcome
            add(cells, column * width + slot, 1, _TOKENS_FINISHED * width + slot, tokens, _FINISHED * width + slot, 1)
        if self.on_close is not None:
            self.on_close(self.slot)

    def withdraw(self) -> None:
        """Give the instance back unused; it was no request. Idempotent."""
        if self.closed:
            return
        _withdraw(self._row, self.slot, self.tokens)
        self.closed, self.tokens = True, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"Lease(slot={self.slot}, generation={self.generation}, tokens={self.tokens}, {state})"


def take(table: TableReader, row: CounterRow, slot: int, generation: int, tokens: int = 0) -> Lease | None:
    """Claim `slot` as the view showed it. None: it is no longer that; look at a new view, which leaves it out."""
    cells, width = row.cells, row.width
    add(cells, _STARTED * width + slot, 1, _TOKENS_STARTED * width + slot, tokens)
    full()
    if table.is_open(slot, generation):
        return Lease(row, slot, generation, tokens)
    _withdraw(row, slot, tokens)
    table.refuse(slot)
    return None


def _withdraw(row: CounterRow, slot: int, tokens: int) -> None:
    cells, width = row.cells, row.width
    add(cells, _WITHDRAWN * width + slot, 1, _TOKENS_WITHDRAWN * width + slot, tokens)
    add(cells, _TOKENS_FINISHED * width + slot, tokens, _FINISHED * width + slot, 1)
