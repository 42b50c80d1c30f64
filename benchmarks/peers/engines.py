"""The fake engines of a run: one process serves several engines, over HTTP or over Penstock's native protocol."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.peers.http import get
from benchmarks.peers.install import tool
from benchmarks.peers.process import Children, free_ports
from benchmarks.peers.scenarios import Pace

ENGINES = 4


class Engines:
    """Steered by lines on its standard input; every line is answered by one."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def pace(self, pace: Pace) -> None:
        if (answer := self._ask(f"set {pace.line}")) != "ok":
            raise RuntimeError(f"the engine says {answer!r}")

    def counts(self) -> dict[str, int]:
        """Requests, streams, events and so on since its start."""
        counts: dict[str, int] = json.loads(self._ask("stats"))
        return counts

    def _ask(self, line: str) -> str:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


class HttpEngines(Engines):
    def __init__(self, children: Children, core: int | None) -> None:
        self.first_port = free_ports(ENGINES)
        command = [tool("http_engine"), "--port", str(self.first_port), "--engines", str(ENGINES)]
        super().__init__(children.start(command, core=core, talk=True))
        self.pace(Pace())

    @property
    def ports(self) -> list[int]:
        return [self.first_port + i for i in range(ENGINES)]

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]


class NativeEngines(Engines):
    """Registers with the Penstock at `base` and is ready when its scheduler has accepted all engines."""

    def __init__(self, children: Children, core: int | None, base: str, log: Path) -> None:
        endpoints = json.loads(get(base + "/endpoints"))
        command = [tool("native_engine"), "--engines", str(ENGINES)]
        command += ["--control", endpoints["control"][0], "--load", endpoints["load"][0]]
        process = children.start(command, core=core, log=log, talk=True)
        super().__init__(process)
        assert process.stdout
        if (line := process.stdout.readline().strip()) != "registered":
            raise RuntimeError(f"the native engine ended: {line or log.read_text()[-300:]}")
