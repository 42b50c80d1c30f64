"""The scheduler process: sockets and timers in, decisions of `Registry`, memory and replies out. One event loop.

    control.sock  ROUTER  frontends    FrontendHello, Register, Drain, Tickets, RoutingNotices
    engines.sock  ROUTER  engines      EngineHello, EngineBeat, EngineGoodbye
    load.sock     SUB     engines      Load
    p2p_nccl      ROUTER  vLLM         registrations of its P2pNcclConnector, where configured
    HTTP client           engines      health, models, /metrics

Nothing waits on a peer: sends do not block, questions run as tasks, and a frame that makes no sense is counted and
dropped. What a frontend needs while this process is away lies in shared memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zmq

from broker import policies, wire
from broker.cluster import shares
from broker.config import Config
from broker.errors import ConfigError, WireError
from broker.faces import face_of
from broker.narrator import Narrator
from broker.port import Frames, Port
from broker.scheduler.aborts import Aborts
from broker.scheduler.admission import Admission
from broker.scheduler.asking import Asking
from broker.scheduler.bulletin import Bulletin
from broker.scheduler.collect import Collector
from broker.scheduler.decisions import explained
from broker.scheduler.events import LoadFeed, Source
from broker.scheduler.inquiry import check_pairs
from broker.scheduler.notices import Notices
from broker.scheduler.p2p_nccl import P2pNcclBeats
from broker.scheduler.registrar import Registrar, answer
from broker.scheduler.registry import Registry
from broker.scheduler.tally import Tally
from broker.scheduler.watch import Watch
from broker.table import BEAT_S, SchedulerEvent
from broker.table_writer import TableWriter
from broker.types import LoadReport
from broker.view import TableReader

if TYPE_CHECKING:
    from broker.cluster.member import Member

logger = logging.getLogger("scheduler")

CONTROL_SOCKET, ENGINES_SOCKET, LOAD_SOCKET = "control.sock", "engines.sock", "load.sock"
"""Names in the run directory."""

MAX_FRAME_BYTES = 4 * wire.MAX_CONTROL_BYTES
"""A peer that sends more is cut off by ZMQ; between `wire.MAX_CONTROL_BYTES` and this it is counted and named."""
HWM = 4096
RECLAIM_EVERY = 4
"""Beats."""
QUEUE_TICK_S = 0.01
"""While requests wait. Room is told by the frontend that made it; this finds what nobody tells, such as the counters of
a dead one being settled."""


class Scheduler:
    """Owner of the sockets, the registry and the table. Everything runs on the loop's thread."""

    def __init__(self, run_dir: Path, config: Config, table: TableWriter) -> None:
        """Takes the table over. Called with the loop running."""
        self._run_dir = run_dir
        self._table = table
        self._config = config
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, config.shm.slots + 64)  # one per instance that is followed, and a few
        self._tally = Tally(table.events)
        self._registry = Registry(table, config, time.monotonic_ns())
        self._followed_changes = -1
        self._feed = LoadFeed(self._loop, self._context, self._tally, self._apply)
        reader = TableReader.attach(run_dir, config)
        self._lives = reader.counters.lives
        self._admission = Admission(
            reader, table.queue, table.events, config.scheduler, self._tell, time.monotonic_ns()
        )
        self._member = self._joining(reader) if shares(config) else None
        self._narrator = Narrator(face_of(config), "scheduler")
        self._bulletin = Bulletin(
            self._registry, reader.counters, self._narrator, config.scheduler, time.monotonic_ns()
        )
        self._notices: Notices | None = None
        if policies.need_index(config):
            self._notices = Notices.attach(run_dir, config, reader, table.events, self._loop)
        self._noticed_changes = self._registry.changes
        self._sweeping = False
        self._queue_timer: asyncio.TimerHandle | None = None
        self._answering: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    def _joining(self, reader: TableReader) -> Member:
        """This host's part in the global scheduler, which needs Redis' client as nothing else does."""
        from broker.cluster.joining import member

        return member(self._run_dir.name, self._config, self._table, reader, self._admission, self._sweep_soon)

    def stop(self) -> None:
        self._stopping.set()

    async def run(self, ready: Callable[[], None]) -> None:
        """Serves until `stop`. `ready()` when the configured instances have had their first chance.

        Raises ConfigError when a socket cannot be bound.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._context.term)
            collector = await stack.enter_async_context(
                Collector(self._config.manager, self._context, face_of(self._config))
            )
            self._watch = Watch(self._registry, collector, self._tally, self._config, self._bulletin.removed)
            stack.push_async_callback(self._watch.close)
            self._registrar = Registrar(self._registry, collector, self._tally, self._config)
            self._collector = collector
            self._p2p_nccl = P2pNcclBeats(
                self._registry, self._registrar.register, self._tally, self._config.server.splitwise
            )
            stack.push_async_callback(self._p2p_nccl.close)
            self._asking = Asking(lambda peer, question: self._send(self._frontends, peer, question), self._lives)
            self._aborts = Aborts(self._registry, collector, self._asking)
            self._open(stack)
            self._sweep_soon()
            stack.push_async_callback(self._end_answers)
            stack.callback(self._close_queue)
            if self._notices is not None:
                stack.callback(self._notices.close)
            # A task that fails ends the process: better a restart than half a scheduler.
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._beat()),
                    tasks.create_task(self._registrar.configured(partial(self._mark_ready, ready))),
                ]
                if self._member is not None:
                    running.append(tasks.create_task(self._member.run()))
                await self._stopping.wait()
                for task in running:
                    task.cancel()

    # -- sockets -----------------------------------------------------------------------------------------------

    def _open(self, stack: contextlib.AsyncExitStack) -> None:
        """Binds everything; what is already waiting there is read in the loop's next turn."""
        stack.callback(self._feed.close)
        binds = self._config.engines
        try:
            self._frontends = self._router(stack, CONTROL_SOCKET, "", self._from_frontend)
            self._engines = self._router(stack, ENGINES_SOCKET, binds.control_bind, self._from_engine)
            if binds.p2p_nccl_bind:
                self._bound(stack, "p2p-nccl", (binds.p2p_nccl_bind,), self._from_p2p_nccl)
            self._feed.bind([self._ipc(LOAD_SOCKET), *filter(None, [binds.load_bind])])
        except (zmq.ZMQError, OSError) as e:
            bound = (str(self._run_dir), binds.control_bind, binds.load_bind, binds.p2p_nccl_bind)
            where = ", ".join(filter(None, bound))
            raise ConfigError(f"cannot bind the sockets for engines ({where}): {e}") from e

    def _router(
        self, stack: contextlib.AsyncExitStack, name: str, bind: str, handle: Callable[[bytes, bytes], None]
    ) -> Port:
        """Bound in the run directory under `name`, and at `bind` if that is given."""
        return self._bound(stack, name, tuple(filter(None, (self._ipc(name), bind))), handle)

    def _bound(
        self,
        stack: contextlib.AsyncExitStack,
        name: str,
        binds: Iterable[str],
        handle: Callable[[bytes, bytes], None],
    ) -> Port:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        stack.callback(socket.close)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HWM)
        socket.setsockopt(zmq.RCVHWM, HWM)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error here, not a silent drop
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that comes back under its own name is the same peer
        socket.setsockopt(zmq.IPV6, 1)
        for bind in binds:
            socket.bind(bind)
        port = Port(self._loop, socket, partial(self._receive, name, handle))
        stack.callback(port.close)
        return port

    def _ipc(self, name: str) -> str:
        path = self._run_dir / name
        path.unlink(missing_ok=True)  # left by a killed scheduler
        return f"ipc://{path}"

    def _receive(self, name: str, handle: Callable[[bytes, bytes], None], frames: Frames) -> None:
        peer = frames[0]
        try:
            if len(frames) != 2:
                raise WireError(f"{len(frames) - 1} frames where one belongs")
            handle(peer, frames[1])
            self._follow_fleet()
        except WireError as e:
            self._tally.dropped(name, peer, e)
        except Exception:  # one peer's message must not end the drain of everybody's
            logger.exception("%s: failed on a message of peer %s", name, peer.hex())

    def _send(self, port: Port, peer: bytes, message: wire.SchedulerToFrontend | wire.SchedulerToEngine) -> bool:
        try:
            port.send([peer, wire.encode(message)])
            return True
        except zmq.ZMQError as e:  # Again: it takes no more; EHOSTUNREACH: it is gone. Both say their piece again.
            self._tally.add(SchedulerEvent.REPLIES_DROPPED)
            logger.debug("no reply to peer %s: %s", peer.hex(), e)
            return False

    # -- frontends ---------------------------------------------------------------------------------------------

    def _from_frontend(self, peer: bytes, frame: bytes) -> None:
        match wire.decode(wire.from_frontend, frame, MAX_FRAME_BYTES):
            case wire.FrontendHello(index=index, life=life):
                self._asking.enter((index, life), peer)
                self._send(self._frontends, peer, wire.Welcome(self._table.epoch))
            case wire.Register(call=call, body=body):
                self._answer(peer, call, self._registrar.answer(body))
            case wire.AbortRequests(call=call, body=body):
                self._answer(peer, call, self._aborts.answer(body))
            case wire.Explain(call=call, ident=ident):
                self._answer(peer, call, explained(ident, self._asking))
            case wire.Ended() | wire.Decided() as part:
                self._asking.heard(peer, part)
            case wire.CheckHealth(call=call):
                self._answer(peer, call, self._check_pairs())
            case wire.Drain(call=call, url=url, resume=resume):
                member = self._registry.drain(url, resume)
                if member is None:
                    status, answer_body = answer(404, f"{url} is not registered")
                else:
                    logger.info("%s is %s", url, member.state.name)
                    status, answer_body = answer(200, "success", url=url, state=member.state.name.lower())
                self._send(self._frontends, peer, wire.Reply(call, status, answer_body))
            case wire.Tickets() as tickets:
                self._admission.hear(peer, tickets, time.monotonic_ns())
                self._sweep_soon()
                if self._member is not None:
                    self._member.poke()
            case wire.ShowCluster(call=call):
                status, said = answer(200, "success", cluster=self._member.status() if self._member else None)
                self._send(self._frontends, peer, wire.Reply(call, status, said))
            case wire.RoutingNotices() as notices if self._notices is not None:
                self._notices.hear(notices)

    async def _check_pairs(self) -> tuple[int, bytes]:
        await check_pairs(self._registry, self._collector, self._config.manager, self._narrator)
        return answer(200, "Health check complete")

    def _answer(self, peer: bytes, call: int, answering: Coroutine[Any, Any, tuple[int, bytes]]) -> None:
        """Replies to a call when its answer is there."""

        async def reply() -> None:
            status, body = await answering
            self._follow_fleet()
            self._send(self._frontends, peer, wire.Reply(call, status, body))

        task = self._loop.create_task(reply())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _end_answers(self) -> None:
        for task in list(self._answering):
            task.cancel()
        await asyncio.gather(*self._answering, return_exceptions=True)

    # -- the prefix index --------------------------------------------------------------------------------------

    def _follow_fleet(self) -> None:
        """At once, so that an instance's first requests are noted as its own."""
        if self._notices is not None and self._noticed_changes != self._registry.changes:
            self._noticed_changes = self._registry.changes
            self._notices.follow()

    # -- requests that wait ------------------------------------------------------------------------------------

    def _sweep_soon(self) -> None:
        """Behind the drain that is going on: one sweep for all that it brings."""
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_soon(self._sweep)

    def _sweep(self) -> None:
        self._sweeping = False
        self._admission.sweep(time.monotonic_ns())
        if self._queue_timer is None and not self._admission.is_idle:
            self._queue_timer = self._loop.call_later(QUEUE_TICK_S, self._queue_tick)

    def _queue_tick(self) -> None:
        self._queue_timer = None
        self._admission.tick(time.monotonic_ns())
        self._sweep()

    def _tell(self, address: bytes, message: wire.Grants) -> None:
        self._send(self._frontends, address, message)

    def _close_queue(self) -> None:
        if self._queue_timer is not None:
            self._queue_timer.cancel()

    # -- engines -----------------------------------------------------------------------------------------------

    def _from_engine(self, peer: bytes, frame: bytes) -> None:
        now = time.monotonic_ns()
        match wire.decode(wire.from_engine, frame):
            case wire.EngineBeat() as beat:
                self._send(self._engines, peer, self._registry.beat(beat, now))
            case wire.EngineHello() as hello:
                changes = self._registry.changes
                verdict = self._registry.hello(hello, now)
                self._send(self._engines, peer, verdict)
                if isinstance(verdict, wire.Refused):
                    self._tally.add(SchedulerEvent.REGISTRATIONS_REFUSED)
                    if self._tally.first(("refused", hello.incarnation)):
                        logger.warning("refused %r: %s", hello.endpoint[:200], verdict.reason)
                else:
                    self._tally.add(SchedulerEvent.REGISTRATIONS)
                    if changes != self._registry.changes:
                        role, models = hello.role.name.lower(), ", ".join(hello.models)
                        logger.info("registered %s: native %s, models: %s", hello.endpoint, role, models or "any")
            case wire.EngineGoodbye(incarnation=incarnation):
                if self._registry.goodbye(incarnation, now):
                    logger.info("engine %s said goodbye", incarnation.hex())

    def _from_p2p_nccl(self, peer: bytes, frame: bytes) -> None:
        self._p2p_nccl.hear(frame, time.monotonic_ns())

    def _apply(self, newest: dict[Source, LoadReport]) -> None:
        now = time.monotonic_ns()
        for source, report in newest.items():
            if isinstance(source, str):
                known = self._registry.load(source, report, now)
            else:
                known = self._registry.native_load(source, report, now)
            if not known:
                self._tally.add(SchedulerEvent.LOADS_DROPPED)
        if not self._admission.is_idle:
            self._sweep_soon()

    # -- time --------------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        beats = 0
        while True:
            now = time.monotonic_ns()
            self._table.beat(now)
            for member in self._registry.tick(now):
                forgotten = self._registry.get(member.instance.url) is not member
                logger.warning("%s %s", member.instance.url, "is forgotten" if forgotten else "fell silent")
            self._p2p_nccl.tick(now)
            if beats % RECLAIM_EVERY == 0:
                self._table.reclaim(now)
            if self._followed_changes != self._registry.changes:
                self._followed_changes = self._registry.changes
                self._feed.follow(
                    {m.instance.url: m.instance.load_endpoint for m in self._registry if m.instance.load_endpoint}
                )
            self._watch.turn(now)
            self._follow_fleet()
            self._bulletin.turn(now)
            beats += 1
            await asyncio.sleep(BEAT_S)

    def _mark_ready(self, ready: Callable[[], None]) -> None:
        self._follow_fleet()
        self._table.mark_ready()
        logger.info("ready: epoch %d, %d instances", self._table.epoch, len(self._registry))
        ready()
