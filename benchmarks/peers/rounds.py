"""The order of a comparison: all routers are started, then every round takes one sample of each, in turn.

Within a scenario the routers follow one another, in the opposite order every other round (A B C, C B A), so that what
disturbs the machine disturbs all alike. A sample during which others used the machine, or the hypervisor took it away,
is taken again; if it stays so, the quietest attempt is kept and marked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.engines import HttpEngines
from benchmarks.peers.machine import family, label, memory, wait_for_quiet
from benchmarks.peers.measure import Inputs, Meter, Sample
from benchmarks.peers.process import Children
from benchmarks.peers.routers import Launch, Router
from benchmarks.peers.scenarios import SCENARIOS, Scenario

SETTLE_S = 2.0
"""After the start: health checks and registrations are over."""


@dataclass(frozen=True)
class Mode:
    name: str
    says: str
    router_core: int | None
    other_core: int | None
    workers: tuple[int, ...]
    """Each router is started once for each of these numbers of processes or threads."""
    scenarios: tuple[str, ...]
    """What it runs when nothing else is asked for."""


MODES = {
    "pinned": Mode(
        "pinned", "router on core 1 with one worker, engines and load on core 0", 1, 0, (1,), tuple(SCENARIOS)
    ),
    "free": Mode("free", "nothing pinned; one worker, and two (@2)", None, None, (1, 2), ("ns32", "ns128")),
}


@dataclass(frozen=True)
class Plan:
    routers: Sequence[Router]
    scenarios: Sequence[str]
    """Names; empty = those of each mode."""
    modes: Sequence[Mode]
    rounds: int
    seconds: float
    noise: float
    """Largest share of a core that others, or the hypervisor, may have had during a sample."""
    retries: int
    patience_s: float
    """How long to wait for a quiet machine before a sample."""


Say = Callable[[str], None]


def run(plan: Plan, folder: Path, say: Say, started: Callable[[str, Launch], None]) -> Iterator[Sample]:
    """Yields the samples as they are taken. `started` is told of every router that answers."""
    for mode in plan.modes:
        children = Children()
        try:
            yield from _run_mode(plan, mode, children, folder / mode.name, say, started)
        finally:
            children.stop_all()


def _run_mode(
    plan: Plan, mode: Mode, children: Children, folder: Path, say: Say, started: Callable[[str, Launch], None]
) -> Iterator[Sample]:
    if mode.router_core is not None and not {mode.router_core, mode.other_core} <= os.sched_getaffinity(0):
        say(f"{mode.name}: left out, this process may not use two cores")
        return
    engines = HttpEngines(children, mode.other_core)
    inputs = Inputs(folder, engines)
    launches: list[Launch] = []
    for router in plan.routers:
        for workers in mode.workers if router.command else (1,):
            try:
                launch = Launch(router, workers, mode.router_core, children, engines, mode.other_core, folder)
            except (OSError, RuntimeError) as e:  # one that does not start must not end the comparison
                say(f"{mode.name}: {router.name} left out: {e}")
            else:
                launches.append(launch)
                started(mode.name, launch)
    time.sleep(SETTLE_S)
    for launch in launches:
        yield _idle(mode, launch)
    meter = Meter(inputs, mode.other_core, plan.seconds)
    for round_number in range(plan.rounds):
        for scenario in (SCENARIOS[name] for name in plan.scenarios or mode.scenarios):
            suited = [x for x in launches if x.router.suits(scenario.cache)]
            for launch in suited if round_number % 2 == 0 else reversed(suited):
                sample = _quietest(plan, meter, launch, scenario, say)
                if sample:
                    yield {"mode": mode.name, "round": round_number, **sample}


def _quietest(plan: Plan, meter: Meter, launch: Launch, scenario: Scenario, say: Say) -> Sample | None:
    best: Sample | None = None
    for attempt in range(1 + plan.retries):
        wait_for_quiet(plan.noise, plan.patience_s)
        try:
            sample = meter.sample(launch, scenario)
        except (OSError, RuntimeError) as e:
            say(f"{launch.label} {scenario.name}: no sample: {e}")
            return best
        sample["attempts"] = attempt + 1
        if best is None or _noise(sample) < _noise(best):
            best = sample
        if _noise(best) <= plan.noise:
            break
    assert best is not None
    best["noisy"] = _noise(best) > plan.noise
    return best


def _noise(sample: Sample) -> float:
    return max(float(sample["foreign_share"]), float(sample["stolen_share"]))


def _idle(mode: Mode, launch: Launch) -> Sample:
    """What a router holds before its first load, process by process."""
    pids = family(launch.process.pid) if launch.process else []
    launch.idle_private_kib = memory(pids).private
    return {
        "mode": mode.name,
        "scenario": "idle",
        "router": launch.label,
        "processes": [{"process": label(p), **vars(memory([p]))} for p in pids],
    }
