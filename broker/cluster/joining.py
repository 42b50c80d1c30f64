"""Puts a member together from the scheduler's parts."""

from __future__ import annotations

import socket
from collections.abc import Callable

from broker.cluster.borrowing import Borrowing
from broker.cluster.here import Here
from broker.cluster.lending import Lending
from broker.cluster.locality import machine
from broker.cluster.member import Member
from broker.config import Config
from broker.scheduler.admission import Admission
from broker.table import SchedulerEvent
from broker.table_writer import TableWriter
from broker.view import TableReader


def member(
    run: str, config: Config, table: TableWriter, reader: TableReader, admission: Admission, sweep: Callable[[], None]
) -> Member:
    """Of the host whose run directory is called `run`. The queue tells it of changes from here on."""
    own = Borrowing()
    here_is = machine()
    host = socket.gethostname()[:128]

    def count(event: SchedulerEvent, number: int) -> None:
        table.events[event] += number

    joining = Member(
        Here(
            settings=config.scheduler,
            id=f"{host}:{run}",
            name=f"{host}:{config.server.port}",
            machine=here_is,
            line=admission,
            own=own,
            lending=Lending(reader, table.queue, config.scheduler.instance_capacity, here_is),
            count=count,
            sweep=sweep,
            lives=reader.counters.lives,
        ),
        table.cells,
    )
    admission.abroad = own
    admission.on_change = joining.poke
    admission.yields = joining.yields
    return joining
