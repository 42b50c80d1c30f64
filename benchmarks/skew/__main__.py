"""`python -m benchmarks.skew`: the tables."""

from __future__ import annotations

from dataclasses import replace

import click

from benchmarks.skew.contest import contest, lines
from benchmarks.skew.workload import Workload


@click.command()
@click.option("--places", type=int, help="Requests that an instance runs at once; the workload's by default.")
def main(places: int | None) -> None:
    """Skewed and even load over several hosts. Seconds are of the engines' model."""
    workload = Workload.load()
    if places is not None:
        workload = replace(workload, places=places)
    for shape in workload.shapes:
        for line in lines(workload, shape, contest(workload, shape)):
            click.echo(line)
        click.echo()


if __name__ == "__main__":
    main()
