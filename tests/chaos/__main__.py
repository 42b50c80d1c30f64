"""`python -m tests.chaos --seconds 600 --seed N`."""

from __future__ import annotations

import random
import sys
import tempfile
import traceback
from pathlib import Path

import click

from tests.chaos.blows import KILLS
from tests.chaos.run import chaos

LEAST_PER_MINUTE = 6


@click.command()
@click.option("--seconds", default=600.0, show_default=True, help="How long things are killed.")
@click.option("--seed", type=int, help="Of the order of kills, the load and the lengths; drawn anew by default.")
@click.option("--freezes", is_flag=True, help="Stop schedulers and Redis for seconds, too (SIGSTOP).")
def main(seconds: float, seed: int | None, freezes: bool) -> None:
    """kill -9 of hosts, frontends, schedulers and Redis under load; compares every byte, and that nothing is left."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    click.echo(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="penstock-chaos-") as directory:
        try:
            verdict, blows = chaos(Path(directory), seconds, seed, click.echo, freezes=freezes)
        except AssertionError:
            traceback.print_exc()
            click.echo(f"FAILED with seed {seed}")
            sys.exit(1)
    kills = sum(blow.kind in KILLS for blow in blows)
    enough = kills >= LEAST_PER_MINUTE * seconds / 60
    if verdict.failures or not enough:
        click.echo(f"FAILED with seed {seed}" + ("" if enough else f": only {kills} kills"))
        sys.exit(1)
    click.echo("nothing lost, nothing twice, nothing stuck")


if __name__ == "__main__":
    main()
