"""One run of chaos, from the start of all processes to the verdict."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.chaos.blows import STREAMS, Blow, Blows
from tests.chaos.hosts import Host, cluster
from tests.chaos.load import Habits, Load
from tests.chaos.verdict import Run, Verdict, judge
from tests.support.redis import RedisServer
from tests.support.waiting import PATIENCE_S, until

HOSTS, ENGINES, CAPACITY = 3, 2, 6
OPEN = 70
"""Requests under way or waiting: nearly twice what all engines run at once."""
BUSY_SHARE = 0.7
WORDS = 60
"""Mean length of an answer: 1.5 s at the speed of these engines."""
HABITS = Habits(priorities=("high", "normal", "normal", "normal", "low"), leave=0.05, twins=0.05)
FLAGS = ("--speed", "0.5")
END_WITHIN = 120.0
CALM_WITHIN = PATIENCE_S


def chaos(
    root: Path, seconds: float, seed: int, say: Callable[[str], None], *, freezes: bool = False
) -> tuple[Verdict, list[Blow]]:
    """Raises AssertionError when something does not come back or calm down; else see the verdict's failures."""
    rng = random.Random(seed)
    with cluster(root, hosts=HOSTS, engines=ENGINES, capacity=CAPACITY, flags=FLAGS) as (redis, hosts):
        blows = Blows(redis, hosts, rng, say, freezes=freezes)
        load = asyncio.run(_storm(hosts, blows, rng, seconds))
        calm(redis, hosts)
        runs: dict[str, list[Run]] = defaultdict(list)
        for host in hosts:
            for name, engine in host.engines.items():
                for entry in engine.ledger()["requests"]:
                    runs[entry["id"]].append(Run(name, entry["state"], entry["tokens"], entry["bytes"]))
        verdict = judge(load, runs, blows.struck)
    for blow in blows.struck:
        if blow.streams < STREAMS:
            verdict.failures.append(f"{blow} fell on {blow.streams} streams only")
    for line in (f"{len(blows.struck)} blows: {summary(blows.struck)}", *verdict.lines()):
        say(line)
    return verdict, blows.struck


def summary(blows: Sequence[Blow]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(Counter(blow.kind for blow in blows).items()))


async def _storm(hosts: Sequence[Host], blows: Blows, rng: random.Random, seconds: float) -> Load:
    ports = [host.port for host in hosts]
    async with Load(ports, open=OPEN, share=BUSY_SHARE, words=WORDS, rng=rng, habits=HABITS, is_up=blows.is_up) as load:
        await blows.strike_for(seconds, load)
        await blows.repaired()
        await load.stop(END_WITHIN)
    return load


def calm(redis: RedisServer, hosts: Sequence[Host]) -> None:
    """Every counter back to 0, at hosts, engines and Redis, and everybody in the cluster again."""
    for host in hosts:
        host.await_instances(ENGINES, CALM_WITHIN)
        host.await_idle(CALM_WITHIN)
        for engine in host.engines.values():
            engine.await_idle(CALM_WITHIN)
        until(
            lambda host=host: (host.get("/ready")[1].get("cluster") or {}).get("members") == len(hosts),
            lambda host=host: f"all hosts seen by each other: {host.get('/ready')}",
            CALM_WITHIN,
        )
        for name in ("penstock_queue_tickets", "penstock_queue_lent"):
            until(lambda host=host, name=name: gauge(host, name) == 0, lambda name=name: f"{name} 0", CALM_WITHIN)
    until(lambda: redis.command("KEYS", "*:lease:*") == b"*0\r\n", lambda: redis.command("KEYS", "*"), CALM_WITHIN)


def gauge(host: Host, name: str) -> float:
    """The sum over all labels."""
    text: str = host.get("/metrics")[1]
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))
