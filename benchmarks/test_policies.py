"""The choice of an instance, on the real table: two frontends, 8 to 1,024 candidates.

`pick` is the policy with the live sums it needs; `decide` adds the view, as a frontend does for each request. The
reference is the least that a choice by live counters can cost in numpy: two sums, a difference, an argmin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from broker.config import Config, Shm
from broker.counters import CounterColumn, FrontendCounters, Roster, attach_counters, create_counters
from broker.policies import POLICIES, Options, frontend_rng, make_policy
from broker.policies.base import least
from broker.route import RouteRequest
from broker.table import create_table
from broker.table_writer import TableWriter
from broker.types import Instance, LoadReport, Role
from broker.view import TableReader, View

SIZES = (8, 64, 1024)
REQUEST = RouteRequest(model="m", prompt_tokens=1000)

sizes = pytest.mark.parametrize("n", SIZES)
policies = pytest.mark.parametrize("name", POLICIES)


@pytest.fixture
def reader(tmp_path: Path, n: int) -> Iterator[TableReader]:
    """A table of `n` instances with 0 to 15 requests each from two frontends, all of them reported."""
    config = Config(shm=Shm(frontends=4, slots=n))
    create_table(tmp_path, config)
    owned = create_counters(tmp_path, config)
    roster = Roster(owned)
    roster.enter(0)
    roster.enter(1)
    shared = attach_counters(tmp_path, config)
    rows = [FrontendCounters(shared, index) for index in (0, 1)]
    writer = TableWriter.attach(tmp_path, config)
    writer.take_over()
    rng = Random(1)
    for port in range(n):
        now_ns = time.monotonic_ns()
        slot = writer.admit(Instance(url=f"http://10.0.0.1:{10000 + port}", models=("m",)), now_ns)
        running, waiting = rng.randrange(12), rng.randrange(4)
        for _ in range(running + waiting):
            row = rng.choice(rows)
            row.add(CounterColumn.STARTED, slot)
            row.add(CounterColumn.TOKENS_STARTED, slot, rng.randrange(4000))
        writer.report(slot, LoadReport(running=running, waiting=waiting), now_ns)
    reader = TableReader.attach(tmp_path, config)
    yield reader
    reader.close()
    writer.close()


def view_of(reader: TableReader) -> View:
    return reader.view(Role.MIXED, "m")


@sizes
@policies
@pytest.mark.parametrize("part", ["pick", "decide"])
def test_policy(benchmark: BenchmarkFixture, reader: TableReader, n: int, name: str, part: str) -> None:
    benchmark.group = f"{part}, {n} candidates"
    policy = make_policy(name, Options(waiting_weight=2.0), frontend_rng(0, 0), 0.0)

    def pick() -> int:
        return policy.pick(REQUEST, View(reader, candidates))

    def decide() -> int:
        return policy.pick(REQUEST, view_of(reader))

    view = view_of(reader)
    candidates = view._candidates
    assert benchmark(pick if part == "pick" else decide) in view.slots


@sizes
def test_reference(benchmark: BenchmarkFixture, n: int) -> None:
    benchmark.group = f"pick, {n} candidates"
    rng = np.random.default_rng(1)
    finished = rng.integers(0, 100, (2, n))
    started = finished + rng.integers(0, 16, (2, n))
    benchmark(lambda: int((np.add.reduce(started, 0) - np.add.reduce(finished, 0)).argmin()))


# -- the smallest, with ties drawn: what `least` was chosen from --------------------------------------------


def flat(scores: np.ndarray, rng: Random) -> int:
    ties = np.flatnonzero(scores == scores.min())
    return int(ties[int(rng.random() * len(ties))])


def python_list(scores: np.ndarray, rng: Random) -> int:
    values = scores.tolist()
    smallest = min(values)
    at = -1
    for _ in range(1 + int(rng.random() * values.count(smallest))):
        at = values.index(smallest, at + 1)
    return at


def first(scores: np.ndarray, rng: Random) -> int:
    return int(scores.argmin())


@sizes
@pytest.mark.parametrize("scores", ["distinct", "equal"])
@pytest.mark.parametrize("way", [least, flat, python_list, first])
def test_least(benchmark: BenchmarkFixture, n: int, scores: str, way: Callable[[np.ndarray, Random], int]) -> None:
    benchmark.group = f"smallest of {n} {scores}"
    values = np.random.default_rng(1).permutation(n) if scores == "distinct" else np.zeros(n, dtype=np.int64)
    rng = Random(1)
    benchmark(lambda: way(values, rng))
