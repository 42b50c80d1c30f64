"""`python -m benchmarks.routing` as tests. Virtual time: the same on every machine.

PENSTOCK_TRACE names a Mooncake trace to be replayed as well; without it that part is skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.routing.contest import HEAD, OURS, replays, rows
from benchmarks.routing.workloads import WORKLOADS


@pytest.mark.parametrize("name", [workload.name for workload in WORKLOADS])
def test_no_kind_of_load_is_anybody_elses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Medians of five seeds. A hundredth of spread is less than what other draws of the same rule make of it."""
    for row in rows(5, [name]):
        with capsys.disabled():
            print("", HEAD, *row.lines(), sep="\n")
        verdict = row.verdict()
        assert verdict["p50"] <= 1.05
        assert verdict["p90"] <= 1.05
        assert verdict["hit"] >= 0.97
        assert verdict["spread"] <= 1.01


def test_trace(capsys: pytest.CaptureFixture[str]) -> None:
    trace = os.environ.get("PENSTOCK_TRACE")
    if not trace:
        pytest.skip("PENSTOCK_TRACE names no trace to replay")
    lines = list(replays(Path(trace), 3))
    with capsys.disabled():
        print("", *lines, sep="\n")
    figures = {(line[:3].strip(), line.split()[2]): [float(w) for w in line.split() if "." in w] for line in lines[1:]}
    assert 0.076 <= figures["8", "round_robin"][0] <= 0.082, "the harness itself"
    assert figures["8", OURS][0] >= 0.26
    assert figures["8", OURS][1] <= 1.05
    assert figures["16", OURS][0] >= 0.31
