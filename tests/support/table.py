"""A load table and its counters in a temporary directory, as one run has them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from broker.config import Config, Scheduler, Shm
from broker.counters import FrontendCounters, Roster, attach_counters, create_counters
from broker.table import State, create_table
from broker.table_writer import TableWriter
from broker.types import Instance, Role
from broker.view import TableReader
from shm.segment import Segment


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self, now_ns: int = 1_000_000_000_000) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> int:
        self.now_ns += int(seconds * 1e9)
        return self.now_ns


def instance(url: str, *models: str, role: Role = Role.MIXED, **fields: object) -> Instance:
    return Instance(url=url, models=models, role=role, **fields)  # type: ignore[arg-type]  # the test's own fields


class Run:
    """The segments of one run and its four parts: roster, writer, reader, one frontend's counters."""

    def __init__(self, path: Path, *, slots: int = 16, frontends: int = 4, rest: float = 30.0) -> None:
        self.path = path
        # Policies by load alone: a run that looks prompts up has one segment more.
        policies = Scheduler(policy="request_num", prefill_policy="process_tokens")
        shm = Shm(dir=str(path), slots=slots, frontends=frontends, rest_secs=rest)
        self.config = Config(shm=shm, scheduler=policies)
        self.clock = Clock()
        create_table(path, self.config)
        self._counters = create_counters(path, self.config)
        self._frontends: list[tuple[Segment, FrontendCounters]] = []
        self.roster = Roster(self._counters)
        self.writer = TableWriter.attach(path, self.config)
        self.survivors = self.writer.take_over()
        self.reader = self.attach_reader()

    def attach_reader(self) -> TableReader:
        return TableReader.attach(self.path, self.config, self.clock)

    def frontend(self, row: int) -> FrontendCounters:
        """Row `row`'s next frontend."""
        self.roster.enter(row)
        segment = attach_counters(self.path, self.config)
        counters = FrontendCounters(segment, row)
        self._frontends.append((segment, counters))
        return counters

    def succeed(self) -> list[tuple[int, Instance, State]]:
        """A new scheduler takes over."""
        self.writer = TableWriter.attach(self.path, self.config)
        return self.writer.take_over()

    def admit(self, url: str, *models: str, role: Role = Role.MIXED) -> int:
        return self.writer.admit(instance(url, *models, role=role), self.clock())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for segment, counters in self._frontends:
            counters.close()
            segment.close()
        self.reader.close()
        self.writer.close()
        self._counters.close()
