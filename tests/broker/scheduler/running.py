"""The real scheduler process over real sockets, as the supervisor starts it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import zmq

from broker import config, wire
from broker.config import Config
from broker.counters import create_counters
from broker.errors import PenstockError
from broker.policies import need_index
from broker.prefix import create_prefix, run_layout
from broker.table import create_table
from broker.types import Instance, Role
from broker.view import TableReader
from tests.support.waiting import PATIENCE_S


def settings(**sections: dict[str, object]) -> Config:
    """Quick periods, a small table."""
    quick: dict[str, dict[str, object]] = {
        "manager": {
            "health-check-interval-secs": 0.3,
            "health-check-timeout-secs": 20,
            "health-failure-threshold": 2,
            "health-success-threshold": 2,
            "metrics-interval-secs": 0.2,
        },
        "shm": {"slots": 32, "frontends": 2},
    }
    for section, keys in sections.items():
        quick.setdefault(section, {}).update(keys)
    return config.build(quick)


class RunningScheduler:
    """One run directory, and the scheduler process that serves it now."""

    def __init__(self, run_dir: Path, settings: Config) -> None:
        self.run_dir = run_dir
        self.settings = settings
        create_table(run_dir, settings)
        self._counters = create_counters(run_dir, settings)
        if need_index(settings):
            create_prefix(run_dir, run_layout(settings))
        (run_dir / "config.json").write_bytes(config.dump(settings))
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.reader = TableReader.attach(run_dir, settings)
        self.log = run_dir / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self._sockets: list[zmq.Socket[bytes]] = []

    def start(self) -> None:
        """A new scheduler, ready when this returns."""
        ready, theirs = os.pipe()
        alive, self.alive_end = os.pipe()
        command = [sys.executable, "-m", "broker.scheduler", str(self.run_dir)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--ready-fd", str(theirs), "--alive-fd", str(alive)],
                pass_fds=(theirs, alive),
                stdout=log,
                stderr=log,
            )
        os.close(theirs)
        os.close(alive)
        readable, _, _ = select.select([ready], [], [], PATIENCE_S)
        said = os.read(ready, 64) if readable else b""
        os.close(ready)
        assert said == b"ready\n", self.log.read_text()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.ended()

    def ended(self) -> int:
        """Waits until it has ended; the exit code."""
        assert self.process is not None
        code = self.process.wait(PATIENCE_S)
        self.process = None
        with contextlib.suppress(OSError):
            os.close(self.alive_end)
        return code

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.ended()

    def close(self) -> None:
        if self.process is not None:
            self.kill()
        for socket in self._sockets:
            socket.close()
        self.reader.close()
        self._counters.close()
        self.context.term()

    # -- what the tests say to it ------------------------------------------------------------------------------

    def dealer(self, name: str, endpoint: str = "") -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 60_000)
        socket.connect(endpoint or f"ipc://{self.run_dir / name}")
        return socket

    def kept(self, socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
        """Closed with the run."""
        self._sockets.append(socket)
        return socket

    def call(self, message: wire.Register | wire.Drain) -> tuple[int, dict[str, Any]]:
        with self.dealer("control.sock") as socket:
            socket.send(wire.encode(message))
            reply = wire.decode(wire.to_frontend, socket.recv())
            assert isinstance(reply, wire.Reply)
            assert reply.call == message.call
            return reply.status, json.loads(reply.body)

    def register(self, **fields: object) -> tuple[int, dict[str, Any]]:
        return self.call(wire.Register(7, json.dumps(fields).encode()))

    def engine(self, *, endpoint: str = "", control: str = "", load: str = "") -> NativeEngine:
        return NativeEngine(self, endpoint, control, load)

    # -- what the frontends see --------------------------------------------------------------------------------

    def candidates(self, model: str | None = None, role: Role = Role.MIXED) -> list[Instance]:
        try:
            view = self.reader.view(role, model)
        except PenstockError:
            return []
        return [self.reader.instance(int(slot)) for slot in view.slots]

    def urls(self, model: str | None = None) -> list[str]:
        return [instance.url for instance in self.candidates(model)]

    def slot(self, url: str) -> int:
        """Where the table has it."""
        view = self.reader.view(Role.MIXED, None)
        (slot,) = [int(slot) for slot in view.slots if self.reader.instance(int(slot)).url == url]
        return slot

    def load(self, url: str) -> tuple[int, int, int]:
        """Running, waiting, KV use: what the table says of a candidate; all -1 when it is none."""
        try:
            view = self.reader.view(Role.MIXED, None)
        except PenstockError:
            return -1, -1, -1
        for index, slot in enumerate(view.slots):
            if self.reader.instance(int(slot)).url == url:
                return int(view.running[index]), int(view.waiting[index]), int(view.kv_permille[index])
        return -1, -1, -1


class NativeEngine:
    """The scheduler's side of a native engine, spoken message by message."""

    def __init__(self, scheduler: RunningScheduler, endpoint: str = "", control: str = "", load: str = "") -> None:
        self.incarnation = secrets.token_bytes(wire.INCARNATION_BYTES)
        self.endpoint = endpoint or f"ipc://@penstock-test-{self.incarnation.hex()}"
        self.capacity = 4
        self._socket = scheduler.kept(scheduler.dealer("engines.sock", control))
        self._publisher = scheduler.kept(scheduler.context.socket(zmq.PUB))
        self._publisher.setsockopt(zmq.LINGER, 0)
        self._publisher.connect(load or f"ipc://{scheduler.run_dir / 'load.sock'}")
        self._sequence = 0

    def say(self, message: wire.EngineToScheduler) -> wire.SchedulerToEngine:
        self._socket.send(wire.encode(message))
        answer: wire.SchedulerToEngine = wire.decode(wire.to_engine, self._socket.recv())
        return answer

    def hello(self, **changes: object) -> wire.SchedulerToEngine:
        hello = wire.EngineHello(
            wire.PROTOCOL, self.incarnation, self.endpoint, Role.MIXED, ["m"], self.capacity, b"\x00opaque\xff"
        )
        return self.say(msgspec.structs.replace(hello, **changes))

    def beat(self, *, ready: bool = True) -> wire.SchedulerToEngine:
        return self.say(wire.EngineBeat(self.incarnation, self.capacity, ready))

    def goodbye(self) -> None:
        self._socket.send(wire.encode(wire.EngineGoodbye(self.incarnation)))

    def publish(self, running: int, waiting: int, incarnation: bytes | None = None) -> None:
        load = wire.Load(incarnation or self.incarnation, running, waiting, 100, 500)
        self._publisher.send_multipart([b"load", self._sequence.to_bytes(8, "big"), wire.encode(load)])
        self._sequence += 1


@contextlib.contextmanager
def scheduler(settings: Config, *, started: bool = True) -> Iterator[RunningScheduler]:
    """A run in a directory of its own; short, because the paths of unix sockets are."""
    run_dir = Path(tempfile.mkdtemp(prefix="pst-"))
    running = RunningScheduler(run_dir, settings)
    try:
        if started:
            running.start()
        yield running
    finally:
        running.close()
        shutil.rmtree(run_dir)
