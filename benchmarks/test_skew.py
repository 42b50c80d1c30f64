"""Skewed load over three hosts: `global` beside `local`, FastDeploy's rule and a single ideal line.

Virtual time: the same figures on every machine. Ratios are means over five seeds, and all seeds are printed.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.skew.contest import IDEAL, LOCAL, ORIGINAL, OURS, contest, lines, ratio
from benchmarks.skew.workload import Workload


@pytest.mark.benchmark(group="skew")
def test_hosts_that_help_each_other_answer_almost_as_one_would(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = Workload.load()
    table = benchmark.pedantic(contest, (workload, "skewed"), rounds=1)
    with capsys.disabled():
        print("", *lines(workload, "skewed", table), sep="\n")
    ratios = {name: ratio(table, OURS, name) for name in (LOCAL, ORIGINAL, IDEAL)}
    benchmark.extra_info["p99"] = ratios
    assert ratios[LOCAL] <= 0.5
    assert ratios[ORIGINAL] < 1.0
    assert ratios[IDEAL] <= 1.15
    assert ratio(table, OURS, LOCAL, "makespan") < 1.0


@pytest.mark.benchmark(group="skew")
def test_hosts_that_need_no_help_pay_nothing_for_it(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = Workload.load()
    table = benchmark.pedantic(contest, (workload, "even"), rounds=1)
    with capsys.disabled():
        print("", *lines(workload, "even", table), sep="\n")
    assert ratio(table, OURS, LOCAL, "p50") <= 1.05
