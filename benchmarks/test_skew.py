"""Skewed load over three hosts: `global` beside `local`, FastDeploy's rule and a single ideal line.

Virtual time: the same figures on every machine. Ratios are means over five seeds, and all seeds are printed.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.skew.contest import IDEAL, LOCAL, ORIGINAL, OURS, contest, lines, ratio
from benchmarks.skew.workload import Workload

BARS = {
    "skewed": {(LOCAL, "p99"): 0.5, (ORIGINAL, "p99"): 1.0, (IDEAL, "p99"): 1.15, (LOCAL, "makespan"): 1.0},
    "even": {(LOCAL, "p50"): 1.05},
}
"""By load; what each rule is to be beaten by."""


@pytest.mark.benchmark(group="skew")
@pytest.mark.parametrize(
    "load",
    [
        pytest.param("skewed", id="hosts that help each other answer almost as one would"),
        pytest.param("even", id="hosts that need no help pay nothing for it"),
    ],
)
def test_ours_in_times_of_each_is_below_its_bar(
    load: str, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = BARS[load]
    workload = Workload.load()
    table = benchmark.pedantic(contest, (workload, load), rounds=1)
    with capsys.disabled():
        print("", *lines(workload, load, table), sep="\n")
    ratios = {(other, figure): ratio(table, OURS, other, figure) for other, figure in bars}
    benchmark.extra_info["ratios"] = {" ".join(name): value for name, value in ratios.items()}
    assert {name: value for name, value in ratios.items() if value >= bars[name]} == {}
