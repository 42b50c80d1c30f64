"""Child processes of a run: where they may run, how they end, and ports for them."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Condition = Callable[[], bool]

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Children:
    """Owns every process of a run; each has a process group of its own, which `stop` ends as a whole."""

    def __init__(self) -> None:
        self._all: list[subprocess.Popen[str]] = []

    def start(
        self,
        command: Sequence[str],
        *,
        core: int | None = None,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        talk: bool = False,
    ) -> subprocess.Popen[str]:
        """`core`: the one core it may use; None = all. `talk`: its standard input and output are pipes."""
        with open(log or os.devnull, "ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else output,
                stderr=output,
                env=environment(env or {}),
                cwd=cwd,
                text=True,
                start_new_session=True,
                preexec_fn=lambda: limit(core),
            )
        self._all.append(process)
        return process

    def stop(self, process: subprocess.Popen[str], patience_s: float = 20.0) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):  # also what the leader left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._all.remove(process)

    def stop_all(self) -> None:
        for process in reversed(list(self._all)):
            self.stop(process)


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours, without proxies (everything is on loopback) and without settings meant for another Penstock."""
    kept = {k: v for k, v in os.environ.items() if k.lower() not in PROXIES and not k.startswith("PENSTOCK_")}
    return {**kept, **extra}


def limit(core: int | None) -> None:
    """Runs in the child before its program."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    share_niceness()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def share_niceness() -> None:
    """Makes this process's niceness that of its session. Where sessions share the machine (sched_autogroup), a process
    is nice to those of its own session only."""
    with contextlib.suppress(OSError):  # no such kernel, or not ours to say
        Path("/proc/self/autogroup").write_text(str(os.nice(0)))


def free_ports(count: int = 1) -> int:
    """The first of so many free ports in a row."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(_bound(0)).getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                for port in range(first + 1, first + count):
                    held.enter_context(_bound(port))
                return int(first)


def _bound(port: int) -> socket.socket:
    s = socket.socket()
    try:
        s.bind(("127.0.0.1", port))
    except BaseException:
        s.close()
        raise
    return s


def wait_until(condition: str, patience_s: float, met: Condition) -> None:
    """Polls until `met()` is true. Raises TimeoutError naming the condition."""
    end = time.monotonic() + patience_s
    while not met():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {patience_s:g} s: {condition}")
        time.sleep(0.1)
