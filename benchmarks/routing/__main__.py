"""`python -m benchmarks.routing`: the five kinds of load, and a trace if there is one."""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.routing.contest import HEAD, replays, rows
from benchmarks.routing.workloads import WORKLOADS


@click.command()
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A Mooncake trace (JSONL).")
@click.option("--seeds", default=5, show_default=True, help="Runs per cell; medians are shown.")
@click.option("--load", "loads", multiple=True, type=click.Choice([w.name for w in WORKLOADS]), help="Only these.")
@click.option("--short", is_flag=True, help="One seed.")
def main(trace: Path | None, seeds: int, loads: tuple[str, ...], short: bool) -> None:
    """Routing quality in virtual time. Seconds are of the engines' model."""
    seeds = 1 if short else seeds
    click.echo(f"eight engines, median of {seeds} seed(s)\n{HEAD}")
    for row in rows(seeds, loads):
        for line in row.lines():
            click.echo(line)
    if trace is None:
        click.echo("no trace replayed: none was given (--trace)")
        return
    for line in replays(trace, min(seeds, 3)):
        click.echo(line)


if __name__ == "__main__":
    main()
