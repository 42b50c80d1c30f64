"""A registry in virtual time, over a table that is a dict."""

from __future__ import annotations

from typing import Any

import msgspec

from broker import config, wire
from broker.config import Config
from broker.errors import TableFull
from broker.scheduler.registry import SECOND_NS, Registry
from broker.table import State
from broker.types import EngineKind, Instance, LoadReport, Role

SETTINGS = config.build(
    {
        "manager": {
            "health-failure-threshold": 3,
            "health-success-threshold": 2,
            "health-check-interval-secs": 5,
            "health-check-timeout-secs": 5,
            "expire-after-secs": 600,
        }
    }
)
BEAT_NS = SECOND_NS // 4


class FakeTable:
    """The table as the registry sees it; keeps what was written, in order."""

    def __init__(self, slots: int = 4) -> None:
        self.epoch = 0
        self.rows: dict[int, tuple[Instance, State]] = {}
        self.writes: list[str] = []
        self.reports: dict[int, LoadReport] = {}
        self._free = list(range(slots))

    def take_over(self) -> list[tuple[int, Instance, State]]:
        self.epoch += 1
        return [(slot, instance, state) for slot, (instance, state) in sorted(self.rows.items())]

    def admit(self, instance: Instance, now_ns: int) -> int:
        if not self._free:
            raise TableFull("full")
        slot = self._free.pop(0)
        self.rows[slot] = instance, State.READY
        self.writes.append(f"admit {slot}")
        return slot

    def describe(self, slot: int, instance: Instance) -> None:
        self.rows[slot] = instance, self.rows[slot][1]
        self.writes.append(f"describe {slot}")

    def set_state(self, slot: int, state: State) -> None:
        self.rows[slot] = self.rows[slot][0], state
        self.writes.append(f"{state.name} {slot}")

    def report(self, slot: int, report: LoadReport, now_ns: int) -> None:
        assert slot in self.rows
        self.reports[slot] = report

    def remove(self, slot: int, now_ns: int) -> None:
        del self.rows[slot]
        self.writes.append(f"remove {slot}")


class World:
    """A registry, its table, and the clock."""

    def __init__(self, settings: Config = SETTINGS, table: FakeTable | None = None) -> None:
        self.now = 1000 * SECOND_NS
        self.table = table or FakeTable()
        self.settings = settings
        self.registry = Registry(self.table, settings, self.now)

    def http(self, host: str = "a", **fields: Any) -> Instance:
        instance = Instance(url=f"http://{host}:1", engine=EngineKind.VLLM, **fields)
        self.registry.register(instance, self.now)
        return instance

    def hello(self, incarnation: bytes = b"1" * 16, host: str = "n", **changes: Any) -> wire.SchedulerToEngine:
        hello = wire.EngineHello(wire.PROTOCOL, incarnation, f"tcp://{host}:1", Role.MIXED, ["m"], 4)
        return self.registry.hello(msgspec.structs.replace(hello, **changes), self.now)

    def beat(self, incarnation: bytes = b"1" * 16, capacity: int = 4, ready: bool = True) -> wire.SchedulerToEngine:
        return self.registry.beat(wire.EngineBeat(incarnation, capacity, ready), self.now)

    def probe(self, url: str, *outcomes: bool) -> None:
        for ok in outcomes:
            member = self.registry.get(url)
            assert member is not None
            self.registry.probed(member, ok, self.now)

    def live(self, seconds: float, *beating: bytes) -> None:
        """Time passes tick by tick; the engines named beat twice a second."""
        end = self.now + int(seconds * SECOND_NS)
        while self.now < end:
            self.now = min(self.now + BEAT_NS, end)
            for incarnation in beating:
                self.beat(incarnation)
            self.registry.tick(self.now)

    def state(self, url: str) -> State | None:
        member = self.registry.get(url)
        if member is None:
            return None
        assert self.table.rows[member.slot] == (member.instance, member.state)
        return member.state
