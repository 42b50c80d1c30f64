"""Requests for pairs among full engines, with the real line and the real queue: all end, and nothing leaks."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from broker import wire
from broker.errors import ConnectFailed, PenstockError
from broker.scheduler.admission import Admission as Queue
from broker.table import QueueColumn, SchedulerEvent, State
from frontend.forward import Forward
from tests.frontend.fakes import Client, FakeCall
from tests.frontend.test_pair_line import Scene

STEPS = 200


class World(Scene):
    """The scene, with a scheduler that grants, and engines that answer in any order."""

    def __init__(self, path: Path, prefills: int, decodes: int, seed: int) -> None:
        super().__init__(path, prefills, decodes)
        self.rng = random.Random(seed)
        self.asked: list[tuple[Forward, Client]] = []
        self.over: set[FakeCall] = set()
        run, now_ns = self.run, time.monotonic_ns()
        self.queue = Queue(
            run.attach_reader(),
            run.writer.queue,
            run.writer.events,
            self.config.scheduler,
            lambda _, message: self.admission.hear(message),
            now_ns,
        )
        self.admission.offer_again()
        self.pump()

    def _send(self, message: wire.Tickets) -> bool:
        self.queue.hear(b"frontend", message, time.monotonic_ns())
        return True

    def pump(self) -> None:
        """Until nobody has anything more to say."""
        for _ in range(50):
            before = dict(self.run.reader.events())
            self.turn()
            self.queue.sweep(time.monotonic_ns())
            self.time.advance(0.0)
            if before == dict(self.run.reader.events()):
                return

    @property
    def under_way(self) -> list[FakeCall]:
        return [call for call in self.http.calls if not call.cancelled and call not in self.over]

    def answer(self, call: FakeCall) -> None:
        self.over.add(call)
        call.answer(b"done")

    def step(self) -> None:
        kind, calls = self.rng.random(), self.under_way
        if kind < 0.5:
            self.asked.append(self.ask())
        elif kind < 0.9 and calls:
            self.answer(self.rng.choice(calls))
        elif kind < 0.94 and self.asked:
            self.rng.choice(self.asked)[0].cancel()
        elif kind < 0.97 and calls:
            call = self.rng.choice(calls)
            self.over.add(call)
            call.sink.fail(ConnectFailed("refused"))
        elif kind < 0.98:
            slot = self.rng.choice(list(self.slots.values()))
            self.run.writer.set_state(slot, self.rng.choice((State.DRAINING, State.READY)))
        if self.rng.random() < 0.7:
            self.pump()

    def settle(self) -> None:
        """Every instance is there, and every engine answers."""
        for slot in self.slots.values():
            self.run.writer.set_state(slot, State.READY)
        for _ in range(10 * len(self.asked)):
            self.pump()
            if not (calls := self.under_way):
                return
            self.answer(calls[0])
        raise AssertionError(f"{len(self.forwarder.live)} still under way: {self.admission!r}, {self.queue!r}")

    def cells(self, column: QueueColumn) -> int:
        slots = self.run.writer.slots
        return sum(self.run.writer.queue[column * slots : (column + 1) * slots].tolist())


def endings(client: Client) -> int:
    return sum(heard == "end" or isinstance(heard, PenstockError) for heard in client.heard)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("prefills", "decodes"), [(1, 1), (1, 2), (2, 1), (3, 3)])
def test_all_end_and_nothing_leaks(tmp_path: Path, prefills: int, decodes: int, seed: int) -> None:
    world = World(tmp_path, prefills, decodes, seed)
    for _ in range(STEPS):
        world.step()
    world.settle()
    assert not world.forwarder.live
    assert all(endings(client) <= 1 for _, client in world.asked)
    assert sum(endings(client) for _, client in world.asked) > STEPS / 5
    assert (world.held("p"), world.held("d")) == (0, 0)
    assert [world.cells(QueueColumn[name]) for name in ("RESERVED", "TICKETS", "HELD")] == [0, 0, 0]
    events = world.run.reader.events()
    assert events[SchedulerEvent.TICKETS_GRANTED] > 0
    world.close()
