"""Real processes for tests: started from a clean server process, never left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

# Not "fork": the test process may have threads. Not "spawn": importing numpy anew takes each child a third of a second.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["numpy", "broker.view", "broker.lease", "shm.rundir"])


@contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """`target(*arguments)` in a process of its own. At the end it has left by itself with 0, or was killed by us."""
    process = _processes.Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        alive = process.is_alive()
        if alive and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert alive or process.exitcode in (0, -signal.SIGKILL), f"{target.__name__} ended with {process.exitcode}"


def pipe() -> tuple[Connection, Connection]:
    """Two ends; one may be given to a child."""
    return _processes.Pipe()


def kill(process: BaseProcess) -> None:
    """kill -9, and reaped."""
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
