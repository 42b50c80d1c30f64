"""`python -m tests.chaos --seconds 600 --seed N`."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import click

from tests.chaos.blows import KILLS, LEAST_PER_MINUTE
from tests.chaos.run import chaos


@click.command()
@click.option("--seconds", default=600.0, show_default=True, help="How long things are killed.")
@click.option("--seed", type=int, help="Of the order of kills, the load and the lengths; drawn anew by default.")
@click.option("--freezes", is_flag=True, help="Stop schedulers and Redis for seconds, too (SIGSTOP).")
def main(seconds: float, seed: int | None, freezes: bool) -> None:
    """kill -9 of hosts, frontends, schedulers and Redis under load; compares every byte, and that nothing is left.

    The logs of a run that fails are kept.
    """
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    click.echo(f"seed {seed}")
    directory = Path(tempfile.mkdtemp(prefix="penstock-chaos-"))
    if why := _failure(directory, seconds, seed, freezes):
        click.echo(f"FAILED with seed {seed}: {why}; logs in {directory}")
        sys.exit(1)
    shutil.rmtree(directory)
    click.echo("nothing lost, nothing twice, nothing stuck")


def _failure(directory: Path, seconds: float, seed: int, freezes: bool) -> str:
    """What went wrong; empty: nothing."""
    try:
        verdict, blows = chaos(directory, seconds, seed, click.echo, freezes=freezes)
    except AssertionError as e:
        traceback.print_exc()
        return str(e).partition("\n")[0]
    kills = sum(blow.kind in KILLS for blow in blows)
    if verdict.failures:
        return f"{len(verdict.failures)} failures"
    return "" if kills >= LEAST_PER_MINUTE * seconds / 60 else f"only {kills} kills"


if __name__ == "__main__":
    main()
