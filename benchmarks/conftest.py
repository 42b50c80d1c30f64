"""What `make bench` writes: statistics, and not each of the millions of samples behind them. And what it prints below
the tables: the figures that benchmarks work out themselves (`extra_info`), such as ratios of two ways."""

from __future__ import annotations

from typing import Any

import pytest

FIGURES = pytest.StashKey[list[tuple[str, dict[str, Any]]]]()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
    found = [(benchmark["name"], benchmark["extra_info"]) for benchmark in output_json["benchmarks"]]
    config.stash[FIGURES] = [(name, figures) for name, figures in found if figures]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name, figures in config.stash.get(FIGURES, []):
        terminalreporter.write_line(f"{name}: {', '.join(f'{what} {value}' for what, value in figures.items())}")
