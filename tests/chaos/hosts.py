"""Three Penstocks of one cluster on this machine, with simulated engines and a Redis; each part of it can be killed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.support.processes import Fleet
from tests.support.redis import RedisServer
from tests.support.waiting import PATIENCE_S, until

RESTART_WITHIN = PATIENCE_S


class Host(Fleet):
    """A fleet whose Penstock may be killed as a whole, and started anew on the same port. Its engines live on, and
    register again."""

    _lives = itertools.count(2)

    def kill_host(self) -> None:
        """SIGKILL to the supervisor and all that it has started, at the same moment as far as that goes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            supervisor = psutil.Process(self.supervisor.popen.pid)
            everyone = [supervisor, *supervisor.children(recursive=True)]
            for process in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()  # so that none of them sees another die
            for process in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.supervisor.popen.wait(PATIENCE_S)

    def restart(self) -> None:
        """Starts Penstock again; returns when it answers and its engines are there. Its output goes to a new file."""
        command = self.supervisor.popen.args
        assert isinstance(command, list)
        self.supervisor = self.program(f"supervisor-{next(self._lives)}", command[1:])
        until(self._answers, lambda: f"the restart of Penstock:\n{self.supervisor.output}", RESTART_WITHIN)
        self.await_instances(len(self.engines), RESTART_WITHIN)


def config(redis: RedisServer, **scheduler: object) -> dict[str, dict[str, object]]:
    """Of a host in the cluster of that Redis."""
    return {
        "scheduler": {
            "name": "global",
            "host": "127.0.0.1",
            "port": redis.port,
            "unreachable": "local",
            **scheduler,
        },
        "server": {"decision-header": "always"},
        "manager": {"health-check-interval-secs": 1.0},
    }


@contextlib.contextmanager
def cluster(
    root: Path, *, hosts: int, engines: int, capacity: int, flags: tuple[str, ...] = (), workers: int = 2
) -> Iterator[tuple[RedisServer, list[Host]]]:
    """`engines` per host, of which every other one speaks HTTP. Everything is there and registered."""
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer(root))
        fleets = []
        for k in range(hosts):
            (directory := root / f"host-{k}").mkdir()
            fleets.append(stack.enter_context(Host(directory, workers=workers, config=config(redis))))
        for k, fleet in enumerate(fleets):
            for n in range(engines):
                transport = "http" if n % 2 else "zmq"
                fleet.engine(f"h{k}e{n}", "--transport", transport, "--capacity", str(capacity), *flags)
        for fleet in fleets:
            fleet.await_instances(engines)
        yield redis, fleets
