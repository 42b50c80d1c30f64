"""A simulated engine as a real process, and what it must answer."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from typing import Any, Self
from urllib.parse import urlsplit

from broker.worker.sim.text import Kind, Words, prompt_of
from tests.support.waiting import PATIENCE_S


class Simulated:
    """`python -m broker.worker.sim OPTIONS`. A context manager; leaving it ends the process with SIGTERM."""

    def __init__(self, *options: str, name: str = "a", pass_fds: tuple[int, ...] = ()) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "broker.worker.sim", "--name", name, "--speed", "20", *options],
            stdout=subprocess.PIPE,
            pass_fds=pass_fds,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait()}"
        self.said: dict[str, Any] = json.loads(line)
        self.url: str = self.said["url"]
        self.admin: str = self.said["admin"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()

    @property
    def port(self) -> int:
        port = urlsplit(self.url).port
        assert port is not None
        return port

    def call(self, path: str, body: object = None, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """One request on a connection of its own. Raises what http.client raises when the answer is not HTTP."""
        parts = urlsplit(self.admin)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=PATIENCE_S)
        try:
            raw = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("GET" if raw is None else "POST", path, raw, headers or {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def json(self, path: str, body: object = None) -> Any:
        status, answer = self.call(path, body)
        assert status == 200, answer
        return json.loads(answer)

    def fault(self, **changes: object) -> None:
        self.json("/fault", changes)

    def ledger(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.json("/ledger")["requests"]
        return entries


def expected(kind: Kind, body: dict[str, Any], name: str, transfer: bytes = b"") -> str:
    """The text that the engine of that name must answer when only `max_tokens` stops it."""
    return Words(prompt_of(kind, body).digest, name, transfer).text(body["max_tokens"])


def pipe() -> tuple[int, int]:
    """Both ends, the reading one fit to be inherited."""
    read, write = os.pipe()
    os.set_inheritable(read, True)
    return read, write
