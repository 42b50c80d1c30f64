"""One child process of the supervisor, and how it is brought back."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence


class Backoff:
    """Delay before the next start of a child that dies again and again. Pure; `now` in seconds."""

    FIRST_S, LONGEST_S, HEALTHY_S = 0.25, 10.0, 30.0

    def __init__(self) -> None:
        self._delay = 0.0

    def after(self, lived: float) -> float:
        """Seconds to wait: none after a healthy life, else doubling."""
        if lived >= self.HEALTHY_S:
            self._delay = 0.0
        delay, self._delay = self._delay, min(max(self._delay * 2, self.FIRST_S), self.LONGEST_S)
        return delay


class Child:
    """One child process across its lives. Owned by the supervisor."""

    def __init__(
        self, name: str, command: Callable[[int, int], Sequence[str]], row: int | None = None, *, quiet: bool = False
    ) -> None:
        """`command(life, ready_fd)` gives the arguments after the interpreter's name; `quiet` drops its stdout."""
        self.name = name
        self.row = row
        self.life = 0
        self.ready = False
        self.leaving = False
        self.start_at: float | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.code = 0
        """How the last life ended: an exit code, or minus a signal."""
        self._command = command
        self._stdout = subprocess.DEVNULL if quiet else None
        self._backoff = Backoff()
        self._ready_fd = -1

    def __repr__(self) -> str:
        return f"Child({self.name!r}, pid={self.pid}, life={self.life}, ready={self.ready})"

    @property
    def pid(self) -> int:
        """0 while there is no process."""
        return self.process.pid if self.process else 0

    def start(self, life: int, inherited: Sequence[int], now: float) -> None:
        """Raises OSError when the system has no process or memory for it."""
        self.life = life
        self.ready, self.start_at, self.started_at = False, None, now
        self._ready_fd, theirs = os.pipe()
        try:
            # -P: a folder `frontend` where Penstock was started is not ours.
            arguments = [sys.executable, "-P", *self._command(self.life, theirs)]
            fds = (*inherited, theirs)
            self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=self._stdout, pass_fds=fds)
        except OSError:
            self._close_ready()
            raise
        finally:
            os.close(theirs)

    def put_off(self, now: float) -> None:
        """It could not be started: it is due again after its back-off."""
        self.start_at = now + self._backoff.after(0.0)

    @property
    def ready_fd(self) -> int:
        """Readable when the child has said that it is ready, or died; -1 once read."""
        return self._ready_fd

    def read_ready(self) -> None:
        self.ready = bool(os.read(self._ready_fd, 16))
        self._close_ready()

    def died(self, now: float) -> int | None:
        """The exit code (negative: signal) once the process has ended; it is reaped then."""
        if self.process is None or (code := self.process.poll()) is None:
            return None
        self.process, self.code = None, code
        self._close_ready()
        self.ready = False
        self.start_at = now + self._backoff.after(now - self.started_at)
        return code

    def signal(self, number: int) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    def _close_ready(self) -> None:
        if self._ready_fd >= 0:
            os.close(self._ready_fd)
            self._ready_fd = -1
