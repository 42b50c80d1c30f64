"""A fleet of engine models behind policies and index as shipped: two frontends, one scheduler's index, virtual time."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from benchmarks.routing.engine import Change, Engine, Job
from broker.policies import Policy
from broker.policies.base import FEW
from broker.prefix import PREFIX, PrefixIndex, PrefixWriter, prefix_layout
from broker.route import RouteRequest
from broker.types import Trust
from broker.wire import RoutingNotices
from shm.segment import Segment

FRONTENDS = 2
NOTICES_S = 0.02
"""From a decision until the other frontend sees it."""

Vector = NDArray[np.int64]
Maker = Callable[[Random, PrefixIndex, Callable[[], float]], Policy]
"""Makes one frontend's policy; it is told the virtual time."""


class Counters:
    """What policies see of the fleet: the live counters, and no reports."""

    def __init__(self, engines: int) -> None:
        self.slots: Vector = np.arange(engines, dtype=np.int64)
        self.listed = tuple(range(engines))
        self.in_flight: Vector = np.zeros(engines, dtype=np.int64)
        self.tokens: Vector = np.zeros(engines, dtype=np.int64)
        self.waiting: Vector = np.full(engines, -1, dtype=np.int64)
        self.trust: Vector = np.full(engines, int(Trust.STALE), dtype=np.int64)

    @property
    def requests(self) -> tuple[int, ...] | Vector:
        return tuple(self.in_flight.tolist()) if len(self.listed) <= FEW else self.in_flight

    @property
    def load(self) -> Vector:
        return self.in_flight


class Router:
    """Two frontends that take turns, and the index between them."""

    def __init__(self, directory: Path, engines: int, make: Maker, seed: int, block: int = 64) -> None:
        path = directory / PREFIX
        path.unlink(missing_ok=True)
        segment = Segment.create(path, prefix_layout(engines, FRONTENDS))
        self._writer = PrefixWriter(segment, dict.fromkeys(range(engines), 1))
        readers = [Segment.attach(path) for _ in range(FRONTENDS)]
        self._indexes = [PrefixIndex(reader, k, block=block) for k, reader in enumerate(readers)]
        self._now = 0.0
        self._policies = [make(Random(f"{seed}/{k}"), index, self.time) for k, index in enumerate(self._indexes)]
        self._on_the_way: deque[tuple[float, RoutingNotices]] = deque()
        self._turn = 0
        self.view = Counters(engines)

    def time(self) -> float:
        """Of the decision."""
        return self._now

    def route(self, job: Job, now: float) -> int:
        self._now = now
        while self._on_the_way and self._on_the_way[0][0] <= now:
            _, notices = self._on_the_way.popleft()
            self._writer.apply(notices)
        k = self._turn = (self._turn + 1) % FRONTENDS
        policy = self._policies[k]
        request = RouteRequest(prompt_tokens=job.prompt, prompt=job.text)
        slot = policy.pick(request, self.view)
        job.charged = policy.tokens(request, slot)
        policy.placed(request, slot)
        while notices_ := self._indexes[k].batch():
            self._on_the_way.append((now + NOTICES_S, notices_))
        job.engine = slot
        self.view.in_flight[slot] += 1
        self.view.tokens[slot] += job.charged
        return slot

    def see(self, change: Change) -> None:
        slot = change.job.engine
        if change.ended:
            self.view.in_flight[slot] -= 1
        counts_until_end = not self._policies[0].counts_prompts
        if change.ended is counts_until_end:
            self.view.tokens[slot] -= change.job.charged


@dataclass
class Outcome:
    """Medians and shares over the counted requests of one run."""

    p50: float
    p90: float
    p99: float
    hit: float
    spread: float
    """Uncached prompt tokens of the busiest engine, by the mean; over the requests counted."""
    busy: float
    slots: float


def run(jobs: list[Job], engines: int, kv_tokens: int, running: int, router: Router) -> Outcome:
    fleet = [Engine(kv_tokens, running) for _ in range(engines)]
    for job in jobs:
        changes = [change for engine in fleet for change in engine.advance(job.at)]
        for change in changes:
            router.see(change)
        fleet[router.route(job, job.at)].put(job)
    last = jobs[-1].at
    busy = sum(engine.prompt_busy_s for engine in fleet) / engines / last
    slots = sum(engine.slots_busy_s for engine in fleet) / engines / last
    for engine in fleet:
        engine.advance(float("inf"))
    counted = jobs[len(jobs) // 5 :]
    first = np.array([job.first_token_at - job.at for job in counted])
    work = np.zeros(engines)
    for job in counted:
        work[job.engine] += job.prompt - job.cached
    p50, p90, p99 = np.percentile(first, (50, 90, 99)).tolist()
    hit = sum(job.cached for job in counted) / sum(job.prompt for job in counted)
    return Outcome(p50, p90, p99, hit, float(work.max() / work.mean()), busy, slots)


@contextmanager
def shared_memory() -> Iterator[Path]:
    parent = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=parent if parent.is_dir() else None) as directory:
        yield Path(directory)
