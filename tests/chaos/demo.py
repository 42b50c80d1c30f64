"""`make cluster-demo`: three hosts, seven tenths of the load at one of them, and who helps whom. Ends with Ctrl-C."""

from __future__ import annotations

import asyncio
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tests.chaos.hosts import Host, cluster
from tests.chaos.load import Load
from tests.support.client import Exchange

HOSTS, ENGINES, CAPACITY = 3, 2, 6
OPEN, BUSY_SHARE, WORDS = 60, 0.7, 60
FLAGS = ("--speed", "0.5")
REFRESH_S = 0.5
PLAIN_S = 2.0
"""Between two lines where there is no terminal."""
RECENT_S = 10.0
EVENTS = 8


@dataclass
class Row:
    """One host, now and in the last seconds."""

    port: int
    waiting: int = 0
    running: int = 0
    """At its own instances, whoever sent them."""
    lent: int = 0
    """Of those, of other hosts."""
    answered: int = 0
    abroad: int = 0
    """Its requests that ran at other hosts."""
    waits: deque[tuple[float, float]] = field(default_factory=deque)
    """When it ended, and how long it had waited for its first byte."""

    def median_wait(self) -> float:
        return statistics.median(wait for _, wait in self.waits) if self.waits else 0.0


class Board:
    """What is known of all hosts. Owned by `show`."""

    def __init__(self, hosts: Sequence[Host], load: Load) -> None:
        self.rows = [Row(host.port) for host in hosts]
        self.events: deque[str] = deque(maxlen=EVENTS)
        self._hosts = hosts
        self._load = load
        self._seen: set[str] = set()
        self._began = time.monotonic()

    async def refresh(self) -> None:
        for row, (_, queue), (_, metrics) in zip(
            self.rows,
            await asyncio.gather(*(asyncio.to_thread(host.get, "/queue") for host in self._hosts)),
            await asyncio.gather(*(asyncio.to_thread(host.get, "/metrics") for host in self._hosts)),
            strict=True,
        ):
            _read(row, queue, metrics)
        now = time.monotonic()
        for number, client in enumerate(self._load.clients):
            row = self.rows[number]
            for exchange in client.ledger.values():
                if exchange.ended_at and exchange.id not in self._seen:
                    self._seen.add(exchange.id)
                    self._note(number, exchange)
            while row.waits and row.waits[0][0] < now - RECENT_S:
                row.waits.popleft()

    def _note(self, host: int, exchange: Exchange) -> None:
        row = self.rows[host]
        if not exchange.whole:
            self.events.append(f"{exchange.id}: {exchange.error() or exchange.state}")
            return
        row.answered += 1
        wait = exchange.first_byte_at - exchange.sent_at
        row.waits.append((exchange.ended_at, wait))
        helper = int(exchange.fingerprint()[1])
        if helper != host:
            row.abroad += 1
            self.events.append(
                f"{exchange.ended_at - self._began:6.1f} s  {exchange.id}: host {helper} ran it for host {host}; "
                f"first word after {wait:.2f} s"
            )

    def table(self) -> Group:
        table = Table(title=f"{BUSY_SHARE:.0%} of the load at host 0, {OPEN} requests open at any time")
        for name in ("host", "in line", "running", "of others", "answered", "elsewhere", "first word"):
            table.add_column(name, justify="right")
        for number, row in enumerate(self.rows):
            table.add_row(
                f"{number} :{row.port}",
                str(row.waiting),
                f"{row.running} of {ENGINES * CAPACITY}",
                str(row.lent),
                str(row.answered),
                str(row.abroad),
                f"{row.median_wait():.2f} s",
            )
        return Group(table, Text("\n".join(self.events)), Text("Ctrl-C ends", style="dim"))

    def plain(self) -> str:
        hosts = "   ".join(
            f"host {number}: {row.waiting} in line, {row.running} running ({row.lent} of others), "
            f"{row.answered} answered ({row.abroad} elsewhere), first word after {row.median_wait():.2f} s"
            for number, row in enumerate(self.rows)
        )
        return f"{time.monotonic() - self._began:6.1f} s  {hosts}"


def _read(row: Row, queue: Any, metrics: str) -> None:
    def total(name: str) -> int:
        lines = [line for line in metrics.splitlines() if line.startswith(name + "{")]
        return round(sum(float(line.rpartition(" ")[2]) for line in lines))

    row.waiting, row.lent = total("penstock_queue_tickets"), total("penstock_queue_lent")
    row.running = total("penstock_instance_in_flight_requests") + row.lent


async def show(hosts: Sequence[Host], seconds: float, stopping: threading.Event, console: Console) -> None:
    ports, until = [host.port for host in hosts], time.monotonic() + (seconds or float("inf"))
    plain_at = 0.0
    async with Load(ports, open=OPEN, share=BUSY_SHARE, words=WORDS, rng=random.Random(1)) as load:
        board = Board(hosts, load)
        with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
            while time.monotonic() < until and not stopping.is_set():
                await board.refresh()
                if live is not None:
                    live.update(board.table(), refresh=True)
                elif time.monotonic() >= plain_at:
                    plain_at = time.monotonic() + PLAIN_S
                    click.echo(board.plain())
                await asyncio.sleep(REFRESH_S)


@click.command()
@click.option("--seconds", default=0.0, help="How long; until Ctrl-C by default.")
def main(seconds: float) -> None:
    """A Redis and three Penstocks on this machine, under skewed load."""
    console = Console()
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()
        click.echo("stopping; what runs is ended, once more Ctrl-C kills it")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    click.echo(f"starting a Redis, {HOSTS} hosts and {HOSTS * ENGINES} simulated engines")
    with (
        tempfile.TemporaryDirectory(prefix="penstock-demo-") as directory,
        cluster(Path(directory), hosts=HOSTS, engines=ENGINES, capacity=CAPACITY, flags=FLAGS) as (_, hosts),
    ):
        if not stopping.is_set():
            asyncio.run(show(hosts, seconds, stopping, console))
    click.echo("ended; no process is left")


if __name__ == "__main__":
    main()
