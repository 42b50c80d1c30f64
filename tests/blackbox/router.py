"""`fd-router` as a process, and how a client speaks to it: raw enough to see what is on the wire."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import yaml

from tests.blackbox.engine import Engine
from tests.support import shmdir
from tests.support.processes import free_port
from tests.support.waiting import PATIENCE_S, until

COMMAND = [str(Path(sys.executable).with_name("fd-router"))]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes
    raw_headers: list[tuple[str, str]]

    def json(self) -> Any:
        return json.loads(self.body)


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command, for starts that end by themselves."""
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False, cwd=cwd
    )


class Router:
    """One run of the command, with the engines that a test adds. stdout and stderr are kept apart."""

    def __init__(
        self,
        root: Path,
        *arguments: str,
        config: Mapping[str, Any] | str | None = None,
        port: int | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """`config`: a tree, or the text of the file. `files` are put into the working directory."""
        self.root = root
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.engines: list[Engine] = []
        self._shm = shmdir.fresh()
        self._arguments = list(arguments)
        if port is None:
            self._arguments += ["--port", str(self.port)]
        if config is not None:
            text = config if isinstance(config, str) else yaml.safe_dump(dict(config))
            (root / "config.yaml").write_text(text)
            self._arguments += ["--config_path", "config.yaml"]
        for name, text in (files or {}).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)

    # -- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._shm.mkdir(exist_ok=True)
        with (self.root / "out").open("ab") as out, (self.root / "err").open("ab") as err:
            self.process = subprocess.Popen(
                [*COMMAND, *self._arguments],
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "PENSTOCK_SHM_DIR": str(self._shm)},
                start_new_session=True,
            )
        until(self._answers, lambda: f"the start of fd-router:\n{self.log}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for engine in self.engines:
            engine.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(PATIENCE_S)
            left = list(self._shm.iterdir())
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        finally:
            shutil.rmtree(self._shm)
        if kind is None:
            assert code == 0
            assert left == []

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log
        try:
            return self.get("/registered_number").status == 200
        except OSError:
            return False

    # -- engines -------------------------------------------------------------------------------------------------

    def engine(self, role: str = "mixed", *, register: bool = True, **fields: object) -> Engine:
        """A new fake engine, registered unless told otherwise."""
        engine = Engine(role, fields)
        self.engines.append(engine)
        if register:
            answer = self.register(engine)
            assert answer.status == 200, answer.body
        return engine

    def register(self, engine: Engine, **fields: object) -> Answer:
        return self.post("/register", {**engine.registration, **fields})

    def dismiss(self) -> None:
        """Ends every engine: the router removes them at the next health check."""
        for engine in self.engines:
            engine.close()
        self.engines.clear()

    def await_empty(self) -> None:
        self.await_number(0)

    def await_number(self, count: int) -> None:
        until(lambda: sum(self.numbers().values()) == count, lambda: f"{count} of {self.registered()}")

    # -- HTTP ----------------------------------------------------------------------------------------------------

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            found = response.getheaders()
            return Answer(response.status, {k.lower(): v for k, v in found}, response.read(), found)
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def post(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, data, {"Content-Type": "application/json", **(headers or {})})

    def chat(self, text: str = "Hello", headers: Mapping[str, str] | None = None, **fields: object) -> Answer:
        return self.post("/v1/chat/completions", chat(text, **fields), headers)

    def open(self, path: str, body: object) -> socket.socket:
        """A request whose answer the test reads itself."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: router\r\nContent-Length: {len(data)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        connection.sendall(head.encode() + data)
        return connection

    def registered(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/registered").json()
        return found

    def numbers(self) -> dict[str, int]:
        found: dict[str, int] = self.get("/registered_number").json()
        return found

    def metric(self, name: str) -> dict[str, float]:
        """Samples of one metric, by the text of their labels."""
        pattern = re.compile(rf"^{re.escape(name)}(\{{.*\}})? (\S+)$", re.MULTILINE)
        return {labels: float(value) for labels, value in pattern.findall(self.get("/metrics").body.decode())}

    # -- log -----------------------------------------------------------------------------------------------------

    @property
    def out(self) -> str:
        return (self.root / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.root / "err").read_text(errors="replace")

    @property
    def log(self) -> str:
        return self.out + self.err

    def await_line(self, pattern: str, where: str = "log") -> re.Match[str]:
        """Until a line of the log matches from its beginning to its end."""
        wanted = re.compile(rf"^{pattern}$", re.MULTILINE)
        return until(lambda: wanted.search(getattr(self, where)), lambda: f"{pattern}\n{self.log[-4000:]}")


def chat(text: str = "Hello", **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **fields}
