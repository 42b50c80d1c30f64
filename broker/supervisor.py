"""`penstock serve`: the process that owns a run.

It resolves nothing and routes nothing. It makes the run directory, the segments and the listening socket, starts
the scheduler, then the frontends, then (asked to) simulated engines; brings back what dies; settles the counters
of a dead frontend; swaps frontends on SIGHUP; and takes everything down on SIGTERM.

    start      scheduler -> "ready" (first pass over register.yaml) -> listen -> frontends -> "ready" -> banner
    child dies reaped here -> a frontend's row is settled -> started again, with back-off
    SIGTERM    listening socket closed -> frontends drain -> engines and scheduler -> memory removed

Children learn of the supervisor's own death by the end of a pipe (`--alive-fd`) whose other end only it holds.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from broker import banner, check, config, log, policies
from broker.child import Child
from broker.config import Config
from broker.counters import Roster, create_counters
from broker.errors import PenstockError
from broker.faces import Event, face_of
from broker.keepalive import keep_alive
from broker.narrator import Narrator
from broker.prefix import create_prefix, run_layout
from broker.table import create_table
from shm.rundir import RunDirectory, RunDirectoryError, remove_stale
from shm.segment import SegmentError

logger = logging.getLogger("supervisor")

START_WITHIN_S = 60.0
"""A frontend that is not ready by then is killed and started again."""
STOP_REST_S = 2.0
"""What engines and scheduler get to stop, after the frontends have drained."""
TURN_S = 1.0


class StartError(PenstockError):
    """The run cannot begin; the message says why."""


class Supervisor:
    """One run of Penstock, from the lock to the last reaped child."""

    def __init__(self, settings: Config, simulated: int = 0) -> None:
        self._config = settings
        self._face = face_of(settings)
        self._simulated = simulated
        self._signals: list[int] = []
        self._selector = selectors.DefaultSelector()
        self._children: list[Child] = []
        self._swaps: list[tuple[Child, Child]] = []
        self._listener: socket.socket | None = None
        self._alive_fd = -1

    def run(self) -> int:
        """Serves until told to stop; returns the exit code. Raises `StartError` when the run cannot begin."""
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(listening_socket(self._config))
            stack.enter_context(self._catching_signals())
            self._run_dir = stack.enter_context(run_directory(self._config))
            self._roster = make_segments(self._run_dir.path, self._config)
            self._alive_fd, alive_end = os.pipe()
            stack.callback(os.close, alive_end)
            stack.callback(os.close, self._alive_fd)
            stack.callback(self._stop)
            self._serve()
        return 0

    # -- start -----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        if not self._start_first(self._scheduler()):
            return
        assert self._listener is not None
        try:
            self._listener.listen(self._config.server.backlog)
        except OSError as e:
            raise StartError(_port_taken(self._config, e)) from e
        for row in range(self._config.server.workers):
            if not self._start_first(self._frontend(row)):
                return
        for number in range(self._simulated):
            self._start(self._engine(number))
        if self._face.shows_banner:
            banner.show(self._config, self._run_dir.path, self._simulated)
        Narrator(self._face, "supervisor").tell(Event.SERVING, port=self._config.server.port)
        rotation = log.Rotation(self._config.log, datetime.datetime.now(), self._face.log_file)
        while not self._stopping:
            self._turn()
            rotation.turn(datetime.datetime.now())

    def _start_first(self, child: Child) -> bool:
        """Starts a child for the first time and waits until it is ready; False when told to stop meanwhile."""
        self._start(child)
        while not child.ready and not self._stopping:
            if child.process is None or child.start_at is not None:
                raise StartError(f"{child.name} did not start ({_how(child.code)}); what it said stands above")
            self._wait()
            self._reap(restart=False)
        return child.ready

    def _start(self, child: Child) -> None:
        if child not in self._children:
            self._children.append(child)
        assert self._listener is not None
        now = time.monotonic()
        try:
            if child.row is None:
                child.start(child.life + 1, [self._alive_fd], now)
            else:
                life = self._roster.enter(child.row)
                child.start(life, [self._alive_fd, self._listener.fileno()], now)
                self._roster.started(child.row, child.pid)
        except OSError as e:  # no memory or no process left: what runs goes on, and this is tried again
            logger.error("%s cannot be started: %s", child.name, e.strerror)
            child.put_off(now)
            if child.row is not None:
                self._roster.settle(child.row)
            return
        self._selector.register(child.ready_fd, selectors.EVENT_READ, child)

    def _scheduler(self) -> Child:
        def command(_life: int, ready_fd: int) -> Sequence[str]:
            return ["-m", "broker.scheduler", str(self._run_dir.path), *self._fds(ready_fd)]

        return Child("scheduler", command)

    def _frontend(self, row: int) -> Child:
        def command(life: int, ready_fd: int) -> Sequence[str]:
            assert self._listener is not None
            listen = ["--listen-fd", str(self._listener.fileno())]
            who = ["--index", str(row), "--life", str(life)]
            return ["-m", "frontend", str(self._run_dir.path), *who, *listen, *self._fds(ready_fd)]

        return Child(f"frontend-{row}", command, row)

    def _engine(self, number: int) -> Child:
        """Simulated engines take turns in how they are reached, so that both transports are seen at work.

        Those over ZMQ name no models and so answer for every name; those over HTTP give `/v1/models` one to list.
        Where pairs are served, they take turns in their roles instead, and are all of one kind.
        """
        if self._config.server.splitwise:
            role = "decode" if number % 2 else "prefill"
            kind = ["--transport", "http", "--model", "simulated", "--role", role]
        else:
            kind = ["--transport", "http", "--model", "simulated"] if number % 2 else ["--transport", "zmq"]

        def command(_life: int, _ready_fd: int) -> Sequence[str]:
            who = ["--name", f"sim-{number}", *kind, "--router", banner.url(self._config)]
            return ["-m", "broker.worker.sim", *who, "--alive-fd", str(self._alive_fd)]

        return Child(f"sim-{number}", command, quiet=True)

    def _fds(self, ready_fd: int) -> list[str]:
        return ["--ready-fd", str(ready_fd), "--alive-fd", str(self._alive_fd)]

    # -- life ------------------------------------------------------------------------------------------

    @property
    def _stopping(self) -> bool:
        return signal.SIGTERM in self._signals or signal.SIGINT in self._signals

    def _turn(self) -> None:
        self._wait()
        self._reap(restart=True)
        now = time.monotonic()
        for child in self._children:
            if child.start_at is not None and now >= child.start_at:
                self._start(child)
            elif (
                child.row is not None and child.process and not child.ready and now > child.started_at + START_WITHIN_S
            ):
                logger.error("%s is not ready after %.0f s: killed", child.name, START_WITHIN_S)
                child.signal(signal.SIGKILL)
        if signal.SIGHUP in self._signals and not self._swaps:
            # All that came during a swap are one, and wait for its end: their rows and turns would be taken twice.
            self._signals = [s for s in self._signals if s != signal.SIGHUP]
            self._begin_swap()
        self._go_on_swapping()

    def _wait(self) -> None:
        """Sleeps until a signal, a child's word or death, or one turn's time."""
        due = [c.start_at - time.monotonic() for c in self._children if c.start_at is not None]
        for key, _ in self._selector.select(max(0.0, min([TURN_S, *due]))):
            if isinstance(key.data, Child):
                self._selector.unregister(key.fd)
                key.data.read_ready()
            else:
                self._signals += os.read(key.fd, 64)

    def _reap(self, *, restart: bool) -> None:
        for child in list(self._children):
            fd = child.ready_fd
            code = child.died(time.monotonic())
            if code is None:
                continue
            if fd >= 0:
                self._selector.unregister(fd)
            if child.row is not None:
                # Only now: the process is reaped, nobody writes the row, and its replacement is not started.
                abandoned = self._roster.settle(child.row)
                if abandoned:
                    logger.warning("%s left %d requests behind", child.name, abandoned)
            if child.leaving:
                self._children.remove(child)
            elif restart:
                logger.error("%s ended (%s); starting it again", child.name, _how(code))

    def _begin_swap(self) -> None:
        """SIGHUP: every frontend is replaced by a new process, one after another, each in a free row."""
        frontends = [c for c in self._children if c.row is not None and not c.leaving]
        rows = {c.row for c in self._children}
        workers, capacity = self._config.server.workers, self._config.shm.frontends
        for old in frontends:
            assert old.row is not None
            # The same remainder keeps the policy's seat: k of N.
            free = (r for r in range(old.row % workers, capacity, workers) if r not in rows)
            row = next(free, None)
            if row is None:
                logger.error("no free row of counters: %s is not swapped", old.name)
                continue
            rows.add(row)
            self._swaps.append((old, self._frontend(row)))

    def _go_on_swapping(self) -> None:
        while self._swaps:
            old, new = self._swaps[0]
            if new not in self._children:
                logger.info("swapping %s for %s", old.name, new.name)
                self._start(new)
            if not new.ready:
                return
            old.leaving = True
            if old.process is None:  # it died meanwhile, and would be started once more for nobody
                self._children.remove(old)
            elif old.row is not None:
                # Not SIGTERM, which bounds the time of streams: for a swap there is no hurry.
                self._roster.leaves(old.row)
                old.signal(signal.SIGUSR2)
            self._swaps.pop(0)

    # -- end -------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Ends every child: frontends first, so that their streams can finish on living engines."""
        assert self._listener is not None
        self._listener.close()
        self._signals = [s for s in self._signals if s not in (signal.SIGTERM, signal.SIGINT)]
        for child in self._children:
            child.leaving, child.start_at = True, None
        frontends = [c for c in self._children if c.row is not None]
        if any(c.ready for c in frontends):
            logger.info("stopping: running streams may take %.0f s", self._config.server.drain_secs)
        self._end(frontends, self._config.server.drain_secs + STOP_REST_S / 2)
        self._end(list(self._children), STOP_REST_S)

    def _end(self, children: list[Child], within_s: float) -> None:
        for child in children:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + within_s
        while any(c.process for c in children):
            self._wait()
            self._reap(restart=False)
            # A second Ctrl-C or SIGTERM means: now.
            if time.monotonic() > deadline or self._stopping:
                for child in children:
                    child.signal(signal.SIGKILL)

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        mine, wakeup = socket.socketpair()
        mine.setblocking(False)
        wakeup.setblocking(False)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
        before = {number: signal.signal(number, lambda *_: None) for number in numbers}
        fd = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        self._selector.register(mine, selectors.EVENT_READ)
        try:
            yield
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.close()
            mine.close()
            wakeup.close()


def listening_socket(settings: Config) -> socket.socket:
    """Bound, not yet listening: connections are refused until the fleet is known. Raises `StartError`."""
    host, port = settings.server.host, settings.server.port
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
    except OSError as e:
        raise StartError(f"cannot listen on {host!r}: {e.strerror}") from e
    # REUSEADDR, not REUSEPORT: a restart need not wait for old connections, a second Penstock must fail.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by every connection: one whose client vanished without a word ends, and with it its request.
    keep_alive(sock)
    try:
        sock.bind(address)
    except OSError as e:
        sock.close()
        raise StartError(_port_taken(settings, e)) from e
    sock.setblocking(False)
    return sock


def _port_taken(settings: Config, e: OSError) -> str:
    return f"cannot listen on {settings.server.host}:{settings.server.port}: {e.strerror}"


@contextlib.contextmanager
def run_directory(settings: Config) -> Iterator[RunDirectory]:
    """This run's directory, after those that dead runs left behind are gone."""
    for stale in remove_stale(settings.shm.dir, "penstock"):
        logger.info("removed %s, which a dead run had left", stale)
    try:
        directory = RunDirectory.create(settings.shm.dir, f"penstock-{settings.server.port}")
    except RunDirectoryError as e:
        raise StartError(f"shm.dir: {e}") from e
    with directory:
        yield directory


def make_segments(path: Path, settings: Config) -> Roster:
    """The shared memory of the run, and the supervisor's part in it. Raises `StartError`."""
    try:
        create_table(path, settings)
        counters = create_counters(path, settings)
        if policies.need_index(settings):
            create_prefix(path, run_layout(settings))
    except SegmentError as e:
        raise StartError(f"shm.dir: {e}") from e
    try:
        (path / "config.json").write_bytes(config.dump(settings))
    except OSError as e:
        raise StartError(f"shm.dir: cannot write {path / 'config.json'}: {e.strerror}") from e
    return Roster(counters)


def serve(settings: Config, simulated: int = 0, doubts: Sequence[str] = ()) -> int:
    """Runs Penstock in this process until it is told to stop. `doubts` about its settings go to the log.

    Raises `StartError`.
    """
    face = face_of(settings)
    log.setup(settings.log, "supervisor", face)
    narrator = Narrator(face, "supervisor")
    for doubt in doubts:
        narrator.tell(Event.CONFIG_DOUBT, problem=doubt)
    if reasons := check.fatal(settings):
        raise StartError("; ".join(reasons))
    return Supervisor(settings, simulated).run()


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
