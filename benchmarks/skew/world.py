"""Virtual time, and an instance that takes requests in it."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from benchmarks.routing.engine import TOKENS_PER_S
from benchmarks.skew.workload import Request, Workload


class World:
    """What happens when. Times in seconds; what is due at once happens in the order in which it was said."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    @property
    def now_ns(self) -> int:
        return round(self.now * 1e9)

    def at(self, when: float, what: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._due, (when, self._serial, what))

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        self.at(self.now + seconds, what)

    def run(self) -> None:
        while self._due:
            self.now, _, what = heapq.heappop(self._due)
            what()


class Instance:
    """An engine that runs so many requests at once, in the model of `benchmarks.routing.engine`: prompts are read one
    after the other, and then each token takes a step. Simplified to a step of constant length, so that every moment is
    known when a request begins, and lines of whole hours are run in a second."""

    def __init__(self, world: World, workload: Workload) -> None:
        self._world = world
        self._token_s = workload.token_s
        self._reads_until = 0.0
        self.room = workload.places

    def run(self, request: Request, ended: Callable[[], None]) -> None:
        """Takes a place until `ended` is called."""
        assert self.room > 0
        self.room -= 1
        request.begun = self._world.now
        self._reads_until = max(self._reads_until, self._world.now) + request.prompt / TOKENS_PER_S
        request.first = self._reads_until + self._token_s
        request.ended = request.first + (request.answer - 1) * self._token_s
        self._world.at(request.ended, lambda: self._end(ended))

    def _end(self, ended: Callable[[], None]) -> None:
        self.room += 1
        ended()
