"""Who is compared, on what, and the tables."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter
from statistics import fmean, median

import numpy as np

from benchmarks.skew.cluster import Counts, Member, Redis
from benchmarks.skew.fastdeploy import FastDeploy
from benchmarks.skew.host import Host
from benchmarks.skew.workload import Request, Workload
from benchmarks.skew.world import Instance, World

MIN_LOAD_SCORE = 3
"""FastDeploy's default and ours."""


def local(world: World, workload: Workload, requests: list[Request], seed: int) -> Counts:
    """Every host for itself."""
    hosts = [Host(world, workload, workload.instances, f"{seed}/{k}") for k in range(workload.hosts)]
    for request in requests:
        world.at(request.at, partial(hosts[request.host].arrive, request))
    return Counts()


def ideal(world: World, workload: Workload, requests: list[Request], _seed: int) -> Counts:
    """One line for all instances, first come, first served, known to all without delay."""
    instances = [Instance(world, workload) for _ in range(workload.hosts * workload.instances)]
    line = deque[Request]()

    def pump() -> None:
        while line and (instance := max(instances, key=attrgetter("room"))).room:
            instance.run(line.popleft(), pump)

    def arrive(request: Request) -> None:
        line.append(request)
        pump()

    for request in requests:
        world.at(request.at, partial(arrive, request))
    return Counts()


def global_(world: World, workload: Workload, requests: list[Request], seed: int, *, least: int) -> Counts:
    """Ours."""
    counts, redis = Counts(), Redis()
    hosts = [Host(world, workload, workload.instances, f"{seed}/{k}") for k in range(workload.hosts)]
    for k, host in enumerate(hosts):
        Member(host, f"host-{k}", redis, least, counts, f"{seed}/{k}")
    for request in requests:
        world.at(request.at, partial(hosts[request.host].arrive, request))
    return counts


def fastdeploy(world: World, workload: Workload, requests: list[Request], seed: int, *, by_host: bool) -> Counts:
    """`by_host`: one list for the instances of a host, which is kinder than the original."""
    nodes, instances = (workload.hosts, workload.instances) if by_host else (workload.hosts * workload.instances, 1)
    rule = FastDeploy(world, workload, nodes, instances, MIN_LOAD_SCORE, f"{seed}")
    per_host = nodes // workload.hosts
    turns = [0] * workload.hosts
    for request in requests:
        turns[request.host] += 1  # a plain balancer in front of a host's instances
        node = request.host * per_host + turns[request.host] % per_host
        world.at(request.at, partial(rule.arrive, request, node))
    return rule.counts


Rule = Callable[[World, Workload, list[Request], int], Counts]

OURS, ORIGINAL, LOCAL, IDEAL = "global", "fastdeploy", "local", "ideal"
RULES: dict[str, Rule] = {
    LOCAL: local,
    ORIGINAL: partial(fastdeploy, by_host=False),
    "fastdeploy by host": partial(fastdeploy, by_host=True),
    OURS: partial(global_, least=MIN_LOAD_SCORE),
    "global, score 1": partial(global_, least=1),
    IDEAL: ideal,
}


@dataclass(frozen=True)
class Outcome:
    """One run. Seconds."""

    p50: float
    p90: float
    p99: float
    mean_wait: float
    makespan: float
    stolen: int
    declined: int
    inversions: int
    """Pairs of neighbours at one host of which the later began first."""
    served: int


def run(rule: Rule, workload: Workload, shape: str, seed: int) -> Outcome:
    requests = workload.make(workload.shapes[shape], seed)
    world = World()
    counts = rule(world, workload, requests, seed)
    world.run()
    p50, p90, p99 = np.percentile([request.ttft for request in requests], (50, 90, 99)).tolist()
    return Outcome(
        p50,
        p90,
        p99,
        fmean(request.wait for request in requests),
        max(request.ended for request in requests),
        sum(request.stolen for request in requests),
        counts.declined,
        sum(_inversions([r for r in requests if r.host == host]) for host in range(workload.hosts)),
        sum(request.begun >= request.at for request in requests),
    )


def _inversions(requests: list[Request]) -> int:
    return sum(later.begun < earlier.begun for earlier, later in pairwise(requests))


Table = dict[str, list[Outcome]]
"""By rule: one outcome per seed."""


def contest(workload: Workload, shape: str, rules: Iterable[str] = RULES) -> Table:
    return {name: [run(RULES[name], workload, shape, seed) for seed in workload.seeds] for name in rules}


def ratio(table: Table, name: str, base: str, figure: str = "p99") -> float:
    """Mean over the seeds: the same requests at the same times under both rules."""
    pairs = zip(table[name], table[base], strict=True)
    return fmean(getattr(one, figure) / getattr(other, figure) for one, other in pairs)


def lines(workload: Workload, shape: str, table: Table) -> Iterable[str]:
    load = workload.shapes[shape].load
    yield (
        f"{shape}: {workload.hosts} hosts x {workload.instances} instances x {workload.places} places, load {load:g}, "
        f"{workload.shapes[shape].busy_share:.0%} of the arrivals at one host, sigma {workload.sigma:g}, "
        f"{workload.requests} requests; medians of {len(workload.seeds)} seeds, p99 of each; {OURS} / rule: means"
    )
    seeds = "".join(f"{f'seed {seed}':>9}" for seed in workload.seeds)
    yield f"{'seconds':20} {'p50':>8} {'p90':>8} {'p99':>8} {'end':>6} {'stolen':>6} {seeds}   {OURS} / rule: p50   p99"
    for name, outcomes in table.items():
        p50, p90, p99, end, stolen = (
            median(getattr(o, f) for o in outcomes) for f in ("p50", "p90", "p99", "makespan", "stolen")
        )
        each = "".join(f"{o.p99:9.2f}" for o in outcomes)
        ratios = f"{ratio(table, OURS, name, 'p50'):20.3f} {ratio(table, OURS, name):5.3f}"
        yield f"{name:20} {p50:8.3f} {p90:8.2f} {p99:8.2f} {end:6.0f} {stolen:6.0f} {each} {ratios}"
    simulated = fmean(o.mean_wait for o in table[IDEAL])
    closed = fmean(workload.mean_wait_s(load, workload.make(workload.shapes[shape], s)) for s in workload.seeds)
    yield f"mean wait in the ideal line {simulated:.2f} s; {closed:.2f} s by Allen and Cunneen, too much for such tails"
