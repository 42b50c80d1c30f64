"""The frontend's end of the control socket, against a scheduler that the test plays."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq

from broker import wire
from broker.errors import SchedulerAway
from frontend.control import Control
from tests.support.table import Run
from tests.support.waiting import PATIENCE_S, eventually

LONG_NS = 3_600_000_000_000
"""A beat so far in the future that the scheduler is alive for the whole test, however slow the machine."""


class Scheduler:
    """The other end: a ROUTER, and the beat in the table."""

    def __init__(self, path: Path, run: Run, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.run = run
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(f"ipc://{path}/control.sock")
        self.heard: list[wire.FrontendToScheduler] = []
        self.peer = b""
        self.live()

    def live(self) -> None:
        self.run.writer.beat(time.monotonic_ns() + LONG_NS)

    def die(self) -> None:
        self.run.writer.beat(time.monotonic_ns() - LONG_NS)

    async def hears(self, kind: type[wire.FrontendToScheduler]) -> wire.FrontendToScheduler:
        """The next message of that kind."""

        def found() -> wire.FrontendToScheduler | None:
            while self.socket.poll(0):
                self.peer, frame = self.socket.recv_multipart()
                self.heard.append(wire.decode(wire.from_frontend, frame))
            return next((message for message in self.heard if isinstance(message, kind)), None)

        message = await eventually(found, f"a {kind}")
        self.heard.remove(message)
        return message

    def says(self, message: wire.SchedulerToFrontend | bytes) -> None:
        self.socket.send_multipart([self.peer, message if isinstance(message, bytes) else wire.encode(message)])


@asynccontextmanager
async def talking() -> AsyncIterator[tuple[Control, Scheduler, list[int]]]:
    """A control client that has been welcomed, its scheduler, and the epochs it heard of."""
    # Not pytest's tmp_path: a unix socket's name has room for 107 bytes.
    with tempfile.TemporaryDirectory(prefix="penstock-") as name, Run(Path(name)) as run, zmq.Context() as context:
        path = Path(name)
        scheduler = Scheduler(path, run, context)
        epochs: list[int] = []
        control = Control(path, run.config, run.reader, 1, 7, context, asyncio.get_running_loop(), epochs.append)
        try:
            assert await scheduler.hears(wire.FrontendHello) == wire.FrontendHello(1, 7, run.reader.epoch)
            scheduler.says(wire.Welcome(run.reader.epoch))
            yield control, scheduler, epochs
        finally:
            control.close()
            scheduler.socket.close()


def with_control(test: Callable[[Control, Scheduler, list[int]], Awaitable[None]]) -> None:
    async def run() -> None:
        async with talking() as (control, scheduler, epochs):
            await test(control, scheduler, epochs)

    asyncio.run(run())


def test_answers_find_their_calls_in_any_order() -> None:
    async def test(control: Control, scheduler: Scheduler, _: list[int]) -> None:
        register = asyncio.create_task(control.register(b'{"port": 1}'))
        first = await scheduler.hears(wire.Register)
        drain = asyncio.create_task(control.drain("http://a", resume=True))
        second = await scheduler.hears(wire.Drain)
        assert isinstance(first, wire.Register)
        assert first.body == b'{"port": 1}'
        assert isinstance(second, wire.Drain)
        assert (second.url, second.resume) == ("http://a", True)
        scheduler.says(wire.Reply(9999, 200, b"nobody asked"))
        scheduler.says(wire.Reply(second.call, 404, b"{}"))
        scheduler.says(wire.Reply(first.call, 200, b"[]"))
        assert (await drain).status == 404
        assert (await register).body == b"[]"

    with_control(test)


def test_a_call_does_not_wait_for_a_scheduler_that_is_away() -> None:
    async def test(control: Control, scheduler: Scheduler, _: list[int]) -> None:
        scheduler.die()
        with pytest.raises(SchedulerAway):
            await control.register(b"{}")

    with_control(test)


def test_a_call_under_way_ends_when_the_scheduler_dies() -> None:
    async def test(control: Control, scheduler: Scheduler, _: list[int]) -> None:
        call = asyncio.create_task(control.register(b"{}"))
        await scheduler.hears(wire.Register)
        scheduler.die()
        with pytest.raises(SchedulerAway):
            await asyncio.wait_for(call, PATIENCE_S)

    with_control(test)


def test_a_new_epoch_ends_calls_is_told_on_and_greeted() -> None:
    async def test(control: Control, scheduler: Scheduler, epochs: list[int]) -> None:
        call = asyncio.create_task(control.register(b"{}"))
        await scheduler.hears(wire.Register)
        scheduler.run.succeed()
        scheduler.live()
        with pytest.raises(SchedulerAway):
            await asyncio.wait_for(call, PATIENCE_S)
        epoch = scheduler.run.reader.epoch
        assert epochs == [epoch]
        assert await scheduler.hears(wire.FrontendHello) == wire.FrontendHello(1, 7, epoch)

    with_control(test)


def test_hello_is_said_again_until_it_is_answered() -> None:
    async def test(control: Control, scheduler: Scheduler, _: list[int]) -> None:
        scheduler.run.succeed()
        epoch = scheduler.run.reader.epoch
        for _ in range(3):
            assert await scheduler.hears(wire.FrontendHello) == wire.FrontendHello(1, 7, epoch)

    with_control(test)


def test_what_is_no_message_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def test(control: Control, scheduler: Scheduler, _: list[int]) -> None:
        for frame in (b"", b"\xc1", b"\x93\x10\x01", wire.encode(wire.FrontendHello(1, 2, 3))):
            scheduler.says(frame)
        call = asyncio.create_task(control.register(b"{}"))
        asked = await scheduler.hears(wire.Register)
        assert isinstance(asked, wire.Register)
        scheduler.says(wire.Reply(asked.call, 200, b"{}"))
        assert (await call).status == 200
        assert len([record for record in caplog.records if record.name == "frontend.control"]) == 1

    with_control(test)


def test_closing_ends_calls_under_way() -> None:
    async def test(control: Control, scheduler: Scheduler, _: list[int]) -> None:
        call = asyncio.create_task(control.register(b"{}"))
        await scheduler.hears(wire.Register)
        control.close()
        with pytest.raises(SchedulerAway):
            await call

    with_control(test)
