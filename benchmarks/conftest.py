"""What `make bench` writes: statistics, and not each of the millions of samples behind them."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
