"""What the scheduler does for the prefix index: enters the frontends' notices, follows the fleet, lets the old go.

All of it is done in the loop's spare turns, a few milliseconds at a time: a beat, a registration or a grant never waits
behind it for longer than one step. What comes faster than it can be entered is dropped, the oldest first: a prefix that
is asked for again is noted again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence
from pathlib import Path
from typing import Protocol

from broker.candidates import Entry
from broker.config import Config
from broker.errors import WireError
from broker.prefix import PrefixWriter, run_layout
from broker.table import SchedulerEvent
from broker.wire import RoutingNotices

logger = logging.getLogger("scheduler")

SHARE_S = 0.002
"""Of one turn of the loop; what has begun is finished, at most a step of 5 ms more."""
WAITING = 512
"""Batches that may wait to be entered, 24 MiB; half a second's work."""


class Fleet(Protocol):
    """What is needed of `broker.view.TableReader`."""

    def entries(self) -> list[Entry]: ...


class Notices:
    """Owner of the index's writing half. Everything on the loop's thread."""

    def __init__(
        self,
        writer: PrefixWriter,
        fleet: Fleet,
        events: MutableSequence[int] | memoryview,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`events` counts by `SchedulerEvent`."""
        self._writer = writer
        self._fleet = fleet
        self._events = events
        self._loop = loop
        self._clock = clock
        self._every_s = config.scheduler.eviction_interval_secs
        self._keep_s = config.scheduler.eviction_duration_mins * 60
        self._known = _slots(fleet)
        self._batches: deque[RoutingNotices] = deque()
        self._forgetting: deque[Iterator[None]] = deque()
        self._aging: Iterator[int] | None = None
        self._turning = False
        self._timer = loop.call_later(self._every_s, self._age)

    @classmethod
    def attach(
        cls, run_dir: Path, config: Config, fleet: Fleet, events: memoryview, loop: asyncio.AbstractEventLoop
    ) -> Notices:
        """Takes the run's index over; of instances that are still there nothing is lost. Raises SegmentError."""
        writer = PrefixWriter.attach(run_dir, run_layout(config), _slots(fleet))
        return cls(writer, fleet, events, config, loop)

    def __repr__(self) -> str:
        return f"Notices({len(self._batches)} batches waiting, {len(self._forgetting)} passes to make)"

    def close(self) -> None:
        self._timer.cancel()
        self._turning = True  # no further turn

    @property
    def is_idle(self) -> bool:
        return not (self._batches or self._forgetting or self._aging)

    def hear(self, notices: RoutingNotices) -> None:
        """From a frontend."""
        if len(self._batches) == WAITING:
            self._events[SchedulerEvent.NOTICES_DROPPED] += len(self._batches.popleft().slots)
        self._batches.append(notices)
        self._soon()

    def follow(self) -> None:
        """The fleet may have changed. Those that left together are forgotten together."""
        now = _slots(self._fleet)
        left = [slot for slot, generation in self._known.items() if now.get(slot) != generation]
        came = now != self._known
        self._known = now
        if left:
            self._forgetting.append(self._writer.forgetting(left))
            self._soon()
        elif came and not self._forgetting:
            self._admit()

    def _admit(self) -> None:
        for slot, generation in self._known.items():
            self._writer.admit(slot, generation)

    def _age(self) -> None:
        self._timer = self._loop.call_later(self._every_s, self._age)
        if self._aging is None:
            self._aging = self._writer.aging(self._clock(), self._keep_s)
            self._soon()

    def _soon(self) -> None:
        if not self._turning:
            self._turning = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        until = self._clock() + SHARE_S
        while not self.is_idle:
            self._step()
            if self._clock() >= until:
                break
        self._turning = False
        if not self.is_idle:
            self._soon()

    def _step(self) -> None:
        """One batch, and a step of a pass if there is one to make: neither waits for the other's end."""
        if self._forgetting:
            if next(self._forgetting[0], self) is self:  # its end
                self._forgetting.popleft()
                if not self._forgetting:  # a slot that is being forgotten is nobody's
                    self._admit()
        elif self._aging is not None and next(self._aging, None) is None:
            self._aging = None
        if self._batches:
            self._apply(self._batches.popleft())

    def _apply(self, notices: RoutingNotices) -> None:
        try:
            counted = self._writer.apply(notices)
        except WireError as error:
            counted = 0
            logger.warning("dropped what frontend %d noted: %s", notices.frontend, error.message)
        self._events[SchedulerEvent.NOTICES_APPLIED] += counted
        self._events[SchedulerEvent.NOTICES_DROPPED] += len(notices.slots) - counted


def _slots(fleet: Fleet) -> dict[int, int]:
    return {entry.slot: entry.generation for entry in fleet.entries()}
