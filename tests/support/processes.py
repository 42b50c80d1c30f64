"""A real Penstock and its engines as processes, for end-to-end tests.

    with Fleet(tmp_path, workers=2) as fleet:
        fleet.engine("a", "--transport", "zmq")
        fleet.await_instances(1)
        fleet.kill("frontend-0")

Leaving the block stops everything with SIGTERM and fails if the exit code is not 0, if it takes for ever, or if
a process or a byte of shared memory is left. Every process started here, and every one that those start, carries a mark
in its environment, by which those that are left are found, and only those are killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from broker.config import parse
from broker.table import LOAD, load_layout
from shm.segment import Segment
from tests.support import shmdir
from tests.support.waiting import PATIENCE_S, until

MARK = "PENSTOCK_TEST_RUN"
ROOT = Path(__file__).parents[2]
STOP_WITHIN = PATIENCE_S
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """A port nobody listens on, below the range that the system gives to outgoing connections.

    A port that the system gave and we closed again could be given to a connection before it is listened on.
    """
    for _ in range(1000):
        port = random.SystemRandom().randrange(12000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("0.0.0.0", port))
                return port
    raise AssertionError("no free port")


class Program:
    """One process in a process group of its own, its output kept in a file."""

    def __init__(self, name: str, arguments: Sequence[str], root: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self._output = root / f"{name}.out"
        with self._output.open("ab") as output:
            self.popen = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __repr__(self) -> str:
        return f"Program({self.name!r}, pid={self.popen.pid}, exit={self.popen.poll()})"

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def await_exit(self, within: float = STOP_WITHIN) -> int:
        try:
            return self.popen.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self!r} has not ended within {within:g} s:\n{self.output}") from None


class Engine(Program):
    """A simulated engine. It says where it listens in its first line of output."""

    def __repr__(self) -> str:
        return f"Engine({self.name!r}, pid={self.popen.pid}, exit={self.popen.poll()})"

    @cached_property
    def said(self) -> dict[str, str]:
        """`url` as registered, and `admin`, where HTTP reaches ledger, faults and metrics of both kinds."""

        def first_line() -> dict[str, str] | None:
            assert self.popen.poll() is None, f"{self!r} has ended:\n{self.output}"
            lines = [line for line in self.output.splitlines() if line.startswith("{")]
            return json.loads(lines[0]) if lines else None

        return until(first_line, lambda: f"{self!r} listens:\n{self.output}")

    @property
    def url(self) -> str:
        return self.said["url"]

    def ledger(self) -> dict[str, Any]:
        """What it was asked and what it sent: `requests`, and whether it is `idle` now."""
        status, body = fetch(self.said["admin"] + "/ledger")
        assert status == 200, body
        found: dict[str, Any] = body
        return found

    def fault(self, **changes: object) -> None:
        """Switch faults on or off (`broker.worker.sim.faults`)."""
        status, body = fetch(self.said["admin"] + "/fault", changes)
        assert status == 200, body

    def await_idle(self, within: float = PATIENCE_S) -> None:
        until(lambda: self.ledger()["idle"], lambda: f"{self!r} idle: {self.ledger()}", within)


class Fleet:
    """One supervisor, and the engines that a test adds. Files go to `root`, shared memory to `shm_dir`."""

    def __init__(
        self,
        root: Path,
        *,
        workers: int = 2,
        sim: int = 0,
        config: Mapping[str, Mapping[str, object]] | None = None,
        arguments: Sequence[str] = (),
        instead: Mapping[str, str] | None = None,
    ) -> None:
        """`config` is the tree of config.yaml; `arguments` are further flags of `penstock serve`; `instead` names the
        modules that are started in the place of Penstock's (`tests.support.standins`)."""
        self.root = root
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.shm_dir = shmdir.fresh()
        self.workers = workers
        self._mark = secrets.token_hex(8)
        self._environment = {**os.environ, MARK: self._mark, "PYTHONUNBUFFERED": "1"}
        self._instead = dict(instead or {})
        if instead:
            self._environment["PYTHONPATH"] = str(ROOT)
        self.engines: dict[str, Engine] = {}
        self._flags = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", str(workers)]
        self._flags += ["--shm-dir", str(self.shm_dir), *arguments]
        if sim:
            self._flags += ["--sim", str(sim)]
        if config:
            (root / "config.yaml").write_text(yaml.safe_dump({k: dict(v) for k, v in config.items()}))
            self._flags += ["--config_path", "config.yaml"]

    # -- life ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.shm_dir.mkdir()
        program = ["tests.support.standins.supervisor", *map("=".join, self._instead.items())]
        self.supervisor = self.program(
            "supervisor", ["-m", *(program if self._instead else ["broker.cli"]), "serve", *self._flags]
        )
        try:
            until(self._answers, lambda: f"the start of Penstock:\n{self.supervisor.output}")
        except BaseException:
            self._kill_left()
            shutil.rmtree(self.shm_dir, ignore_errors=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self.stop()
        except BaseException as failure:
            error = failure
            raise
        finally:
            left = self._kill_left()
            shutil.rmtree(self.shm_dir, ignore_errors=True)
            if error is not None:
                for program in (self.supervisor, *self.engines.values()):
                    print(f"--- {program!r} ---\n{program.output}")
        if kind is None:
            assert not left, f"left running: {left}"

    def stop(self) -> None:
        """SIGTERM, then what the promise of an orderly end says."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            self.supervisor.signal(number)
            for engine in self.engines.values():
                engine.signal(number)
        code = self.supervisor.await_exit()
        assert code == 0, f"exit code {code}"
        for engine in self.engines.values():
            engine.await_exit()
        until(lambda: not self.left(), lambda: f"no process left: {self.left()}")
        assert list(self.shm_dir.iterdir()) == [], "shared memory is left"

    def left(self) -> list[psutil.Process]:
        """Living processes of this fleet."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _kill_left(self) -> list[psutil.Process]:
        left = self.left()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for program in (self.supervisor, *self.engines.values()):
            program.popen.wait()
        return left

    def _answers(self) -> bool:
        code = self.supervisor.popen.poll()
        assert code is None, f"ended with exit code {code}:\n{self.supervisor.output}"
        # The banner comes when every frontend is ready; the first one answers long before.
        return "listening on" in self.supervisor.output and self.get("/health")[0] == 200

    # -- processes -----------------------------------------------------------------------------------------

    def program(self, name: str, arguments: Sequence[str]) -> Program:
        return Program(name, arguments, self.root, self._environment)

    def engine(self, name: str, *arguments: str) -> Engine:
        """Start a simulated engine that registers here; `arguments` as for `penstock sim`."""
        assert name not in self.engines
        command = ["-m", "broker.cli", "sim", "--name", name, "--router", self.url, "--admin-port", "0", *arguments]
        engine = self.engines[name] = Engine(name, command, self.root, self._environment)
        return engine

    def register(self, engine: Engine, /, **fields: object) -> None:
        """One `POST /register` for an HTTP engine that was told no router (`--router ""`)."""
        port = int(engine.url.rpartition(":")[2])
        status, answer = self.post("/register", {"role": "mixed", "host_ip": "127.0.0.1", "port": port, **fields})
        assert status == 200, answer

    def processes(self) -> dict[str, psutil.Process]:
        """By name: `scheduler`, `frontend-K`, `sim-K` (all children of the supervisor), and the test's own engines."""
        found = {name: psutil.Process(engine.popen.pid) for name, engine in self.engines.items()}
        for child in psutil.Process(self.supervisor.popen.pid).children():
            with contextlib.suppress(psutil.Error):
                name = self._name(child.cmdline())
                if name and child.status() != psutil.STATUS_ZOMBIE:
                    found[name] = child
        return found

    def _name(self, command: Sequence[str]) -> str:
        """What a child of the supervisor is, by its command line; empty if it is nothing of ours (yet: between fork
        and exec it still looks like the supervisor)."""
        if "-m" not in command:
            return ""
        module = command[command.index("-m") + 1]
        if module == self._module("broker.scheduler"):
            return "scheduler"
        if module == self._module("frontend"):
            return f"frontend-{command[command.index('--index') + 1]}"
        if module == "broker.worker.sim":
            return command[command.index("--name") + 1]
        return ""

    def _module(self, name: str) -> str:
        return self._instead.get(name, name)

    def process(self, name: str) -> psutil.Process:
        found = self.processes()
        assert name in found, f"no {name} among {sorted(found)}"
        return found[name]

    def kill(self, name: str) -> int:
        """SIGKILL; returns the pid that is no more."""
        process = self.process(name)
        pid: int = process.pid
        process.kill()
        if name in self.engines:
            self.engines.pop(name).popen.wait()
        return pid

    def freeze(self, name: str) -> None:
        """SIGSTOP, and wait until every thread stands."""
        process = self.process(name)
        process.suspend()
        until(lambda: process.status() == psutil.STATUS_STOPPED, f"{name} stopped")

    def freeze_scheduler_in_a_row(self) -> None:
        """The scheduler stands in the middle of a row; its program is `standins.midrow_scheduler`."""
        process = self.process("scheduler")
        process.send_signal(signal.SIGUSR1)
        until(lambda: process.status() == psutil.STATUS_STOPPED, "the scheduler stopped itself")
        settings = parse((self.run_dir / "config.json").read_bytes())
        with Segment.attach(self.run_dir / LOAD, load_layout(settings.shm.slots)) as segment:
            odd = [slot for slot, sequence in enumerate(segment.cells("sequence").tolist()) if sequence & 1]
        assert len(odd) == 1, f"rows being written: {odd}"

    def thaw(self, name: str) -> None:
        self.process(name).resume()

    def await_replaced(self, name: str, pid: int, within: float = PATIENCE_S) -> psutil.Process:
        """Until another process than `pid` has the name."""

        def other() -> psutil.Process | None:
            process = self.processes().get(name)
            return process if process is not None and process.pid != pid else None

        return until(other, f"{name} (pid {pid}) replaced", within)

    @property
    def run_dir(self) -> Path:
        """The run directory with the segments."""
        (found,) = self.shm_dir.glob(f"penstock-{self.port}-*")
        return found

    # -- HTTP ----------------------------------------------------------------------------------------------

    def get(self, path: str) -> tuple[int, Any]:
        """Status, and the body as JSON if it is that, else as text. OSError: nobody answers."""
        return fetch(self.url + path)

    def post(self, path: str, body: object) -> tuple[int, Any]:
        return fetch(self.url + path, body)

    def instances(self) -> list[dict[str, Any]]:
        status, body = self.get("/instances")
        assert status == 200, body
        found: list[dict[str, Any]] = body["instances"]
        return found

    def in_flight(self) -> int:
        """Of all instances together."""
        return sum(instance["in_flight"] for instance in self.instances())

    def await_instances(self, count: int, within: float = PATIENCE_S) -> list[dict[str, Any]]:
        """Until exactly that many are registered and ready."""

        def ready() -> list[dict[str, Any]]:
            found = [instance for instance in self.instances() if instance["state"].lower() == "ready"]
            return found if len(found) == count else []

        return until(ready, lambda: f"{count} ready instances; there are {self.instances()}", within)

    def await_idle(self, within: float = PATIENCE_S) -> None:
        """Until nothing is in flight: exactly 0 at every instance."""
        until(
            lambda: all(instance["in_flight"] == 0 for instance in self.instances()),
            lambda: f"0 in flight; there are {self.instances()}",
            within,
        )


def fetch(url: str, body: object = None, *, within: float = PATIENCE_S) -> tuple[int, Any]:
    """One GET or, with a body (bytes as they are, else as JSON), POST."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with _opener.open(request, timeout=within) as response:
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode(errors="replace")
