"""This host, as its dealings with the cluster see it, through all its terms."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import msgspec

from broker import wire
from broker.cluster import records
from broker.cluster.borrowing import Borrowing
from broker.cluster.lending import Lending
from broker.cluster.records import ForeignRecord
from broker.config import Scheduler
from broker.scheduler.lines import Ident, Ticket
from broker.table import SchedulerEvent

T = TypeVar("T")


class Line(Protocol):
    """What the cluster needs of the admission queue; `broker.scheduler.admission.Admission` is the real one."""

    @property
    def waiting(self) -> tuple[int, int]: ...
    def front(self, limit: int) -> list[tuple[int, Ticket]]: ...
    def paces_ms(self, slots: set[int]) -> dict[int, float]: ...
    def lend(self, ident: Ident) -> Ticket | None: ...
    def grant_abroad(self, ticket: Ticket, lease: wire.RemoteLease, name: str, instance: bytes) -> None: ...


class Peer(NamedTuple):
    """Another host, as of the last beat. For people."""

    id: str
    name: str
    tickets: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Here:
    settings: Scheduler
    id: str
    """Unique to this run."""
    name: str
    """For people."""
    machine: str
    line: Line
    own: Borrowing
    lending: Lending
    count: Callable[[SchedulerEvent, int], None]
    sweep: Callable[[], None]
    """Lets the queue look again, soon."""
    lives: Callable[[], list[tuple[int, int]]]
    """The frontends that there are, by row and life."""
    met: Callable[[list[Peer]], None] = lambda _: None
    """Hears who else is there, at each beat."""
    clock: Callable[[], int] = time.monotonic_ns

    @property
    def token_ms(self) -> float:
        """How long an engine reads one token of a prompt."""
        return 1e3 / self.settings.prefill_tokens_per_sec

    def read(self, decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T | None:
        """A record, or None, counted, for what is none."""
        try:
            return records.decode(decoder, data)
        except ForeignRecord:
            self.count(SchedulerEvent.CLUSTER_IGNORED, 1)
            return None
