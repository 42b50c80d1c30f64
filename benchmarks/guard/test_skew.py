"""What `make bench` shows of skewed load, without its tables, and that its harness tells the truth."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import fmean

import pytest

from benchmarks.skew.contest import IDEAL, LOCAL, ORIGINAL, OURS, RULES, contest, ideal, ratio, run
from benchmarks.skew.workload import Request, Workload
from benchmarks.skew.world import World

SHORT = replace(Workload.load(), requests=2000, seeds=(1,))


def test_skewed_load_is_served_far_better_together_than_alone() -> None:
    table = contest(Workload.load(), "skewed", (LOCAL, ORIGINAL, OURS, IDEAL))
    assert ratio(table, OURS, LOCAL) <= 0.5
    assert ratio(table, OURS, ORIGINAL) < 1.0
    assert ratio(table, OURS, IDEAL) <= 1.15


def test_even_load_is_served_as_well_together_as_alone() -> None:
    assert ratio(contest(SHORT, "even", (LOCAL, OURS)), OURS, LOCAL, "p50") <= 1.05


def test_every_request_is_served_once() -> None:
    for name in (ORIGINAL, OURS):
        outcome = run(RULES[name], SHORT, "skewed", 1)
        assert outcome.served == SHORT.requests
        assert outcome.stolen > 0


@pytest.mark.parametrize("load", [0.5, 0.75])
def test_the_ideal_line_waits_as_long_as_erlang_says(load: float) -> None:
    """Arrivals and lengths without memory: there the closed form is exact. 40,000 requests come within 10 % of it."""
    workload = replace(SHORT, requests=40_000)
    rng = Random("erlang")
    world = World()
    requests, now = [], 0.0
    for number in range(workload.requests):
        now += rng.expovariate(load * workload.servers / workload.service_s(0, 300))
        requests.append(Request(number, now, 0, 0, max(1, round(rng.expovariate(1 / 300)))))
    ideal(world, workload, requests, 0)
    world.run()
    assert fmean(r.wait for r in requests) == pytest.approx(workload.mean_wait_s(load, requests), rel=0.1)
