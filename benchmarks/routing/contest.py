"""Who is measured, against what, and how the tables are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

from benchmarks.routing import replay
from benchmarks.routing.fleet import Maker, Outcome, Router, run, shared_memory
from benchmarks.routing.peers import SglangCacheAware
from benchmarks.routing.workloads import WORKLOADS, Workload
from broker.policies import Options, Policy, WholePrompts, make_policy
from broker.prefix import PrefixIndex

ENGINES = 8
OURS = "prefix_cost"
FASTDEPLOY = Options(hit_ratio_weight=1.0, load_balance_weight=0.05, balance_abs_threshold=1, balance_rel_threshold=0.2)
"""The weights of FastDeploy's example."""


def _shipped(name: str) -> Callable[[], Maker]:
    return lambda: lambda rng, index, clock: make_policy(name, FASTDEPLOY, rng, rng.random(), index, clock)


def _one_for_all(make: Callable[[Random], Policy]) -> Callable[[], Maker]:
    """A peer is one process: both frontends ask the same object."""

    def router() -> Maker:
        made: list[Policy] = []

        def maker(rng: Random, _index: PrefixIndex, _clock: Callable[[], float]) -> Policy:
            if not made:
                made.append(make(rng))
            return made[0]

        return maker

    return router


ROUTERS: dict[str, Callable[[], Maker]] = {
    "round_robin": _one_for_all(lambda rng: make_policy("round_robin", FASTDEPLOY, rng, 0.0)),
    "request_num": _shipped("request_num"),
    "fd cache_aware": _shipped("cache_aware"),
    "sgl cache_aware": _one_for_all(lambda rng: WholePrompts(SglangCacheAware(rng))),
    OURS: _shipped(OURS),
}


@dataclass(frozen=True)
class Cell:
    """One router on one kind of load at one rate: medians over the seeds."""

    p50: float
    p90: float
    p99: float
    hit: float
    spread: float

    @classmethod
    def of(cls, outcomes: Iterable[Outcome]) -> Cell:
        kept = list(outcomes)
        return cls(*(median(getattr(outcome, name) for outcome in kept) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class Row:
    workload: str
    rate: float
    cells: dict[str, Cell]

    def verdict(self) -> dict[str, float]:
        """Ours in units of the best peer: times and work above 1 are worse, hits below 1 are.

        Hits and spread are compared with peers as a router would be blamed: the best hits of all, and the smallest
        spread of those that hit at least 0.95 of it and answer within 1.05 of the best p90. Who lets others wait for
        slots that are free elsewhere is as even as can be: round robin is on `heavy`, at 8 times the best p90.
        """
        ours = self.cells[OURS]
        peers = [cell for name, cell in self.cells.items() if name != OURS]
        best_hit = max(cell.hit for cell in peers)
        best_p90 = min(cell.p90 for cell in peers)
        near = [cell for cell in peers if cell.hit >= 0.95 * best_hit]
        rivals = [cell for cell in near if cell.p90 <= 1.05 * best_p90] or near
        return {
            "p50": ours.p50 / min(cell.p50 for cell in peers),
            "p90": ours.p90 / best_p90,
            "hit": ours.hit / best_hit if best_hit else 1.0,
            "spread": ours.spread / min(cell.spread for cell in rivals),
        }

    def lines(self) -> Iterable[str]:
        for name, cell in self.cells.items():
            yield (
                f"{self.workload:>8} {self.rate:5.1f}/s  {name:<16} {cell.p50:7.2f} {cell.p90:7.2f} {cell.p99:7.2f}"
                f"  {cell.hit:5.3f}  {cell.spread:5.2f}"
            )
        verdict = self.verdict()
        yield f"{'':17} ours by the best   " + "   ".join(f"{name} x{value:.3f}" for name, value in verdict.items())


HEAD = f"{'load':>8} {'rate':>7}  {'policy':<16} {'p50 s':>7} {'p90 s':>7} {'p99 s':>7}  {'hits':>5}  spread"


def rows(seeds: int, names: Iterable[str] = (), rates: tuple[int, ...] = (0, 1)) -> Iterable[Row]:
    """One row after another; all routers get the same requests at the same times."""
    wanted = set(names)
    for workload in WORKLOADS:
        if wanted and workload.name not in wanted:
            continue
        for which in rates:
            rate = workload.rates[which]
            cells = {name: Cell.of(_runs(workload, rate, make, seeds)) for name, make in ROUTERS.items()}
            yield Row(workload.name, rate, cells)


def _runs(workload: Workload, rate: float, make: Callable[[], Maker], seeds: int) -> Iterable[Outcome]:
    for seed in range(seeds):
        jobs = workload.make(Random(f"{workload.name}/{seed}"), rate)
        with shared_memory() as directory:
            router = Router(directory, ENGINES, make(), seed)
            yield run(jobs, ENGINES, workload.kv_tokens, workload.running, router)


def replays(trace: Path, seeds: int) -> Iterable[str]:
    """Lines of the trace's table: 8 and 16 instances, medians over the seeds of the policies' draws."""
    jobs = replay.load(trace)
    yield f"{trace.name}: {len(jobs)} requests"
    for instances in (8, 16):
        for name in ("round_robin", "request_num", "fd cache_aware", "sgl cache_aware", OURS):
            results = []
            for seed in range(seeds if name == OURS else 1):
                with shared_memory() as directory:
                    router = Router(directory, instances, ROUTERS[name](), seed, block=replay.CHARS)
                    results.append(replay.replay(jobs, instances, router))
            hit, spread = median(r.hit for r in results), median(r.spread for r in results)
            yield f"{instances:>3} instances  {name:<16} hits {hit:.4f}  spread {spread:.3f}"
