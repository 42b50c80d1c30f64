"""The frontend's end of the control socket: calls to the scheduler, and the watch over its life.

    frontend DEALER ----FrontendHello, Register, Drain----> ROUTER scheduler      (control.sock in the run directory)
                    <---------Welcome, Reply--------------

A call never waits for a scheduler that is not there: its beat in shared memory says whether it lives, and a call
under way ends when the beat grows old or the epoch changes. Requests for inference never come here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import zmq

from broker import wire
from broker.config import Config
from broker.errors import PenstockError, SchedulerAway, WireError
from broker.view import TableReader

logger = logging.getLogger("frontend.control")

TICK_S = 0.1
"""How often beat and epoch are looked at; with the beat's limit of 1.5 s a call ends within 2 s of a death."""
CALL_SLACK_S = 5.0
"""A registration takes at most one health check and this; then the scheduler is busy beyond reason."""
ENDED_AT_ONCE = 100
"""Requests named in one message: with ids of the most that are taken, it fits a control message."""
CONNECT_S = 1.0
"""Within the 2 s in which a call is answered while the scheduler is away."""
CONNECT_LOOK_S = 0.02
_MARK = 1000
_NOBLOCK = int(zmq.NOBLOCK)  # pyzmq's enum arithmetic costs more than the call
_POLLIN = int(zmq.POLLIN)


class _Pending(NamedTuple):
    answer: asyncio.Future[wire.Reply]
    epoch: int


class Control:
    """Owned by the frontend's process; everything on its loop's thread."""

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        table: TableReader,
        index: int,
        life: int,
        context: zmq.Context[zmq.Socket[bytes]],
        loop: asyncio.AbstractEventLoop,
        on_epoch: Callable[[int], None],
    ) -> None:
        """`on_epoch` hears of every new life of the scheduler. Set `end_requests` before the loop goes on."""
        self.end_requests: Callable[[list[str] | None], list[tuple[str, int]]] = lambda _: []
        """Ends the requests of these names (None: all) and says which there were, and their tokens."""
        self.on_grants: Callable[[wire.Grants], None] = lambda _: None
        """Hears the queue's answers to the tickets of requests that wait."""
        self.explain: Callable[[str], list[bytes]] = lambda _: []
        """What is remembered of the requests of a name, each as JSON that fits a message."""
        self._table = table
        self._who = index, life
        self._loop = loop
        self._on_epoch = on_epoch
        self._limit_s = config.manager.health_check_timeout_secs + CALL_SLACK_S
        self._numbers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._epoch = table.epoch
        self._welcomed = -1
        self._bad_frames = 0
        self._socket = context.socket(zmq.DEALER)
        # IMMEDIATE: without a peer a send fails at once, so nothing is queued for a scheduler that never comes.
        options = ((zmq.IMMEDIATE, 1), (zmq.LINGER, 0), (zmq.SNDHWM, _MARK), (zmq.RCVHWM, _MARK))
        for option, value in (*options, (zmq.RECONNECT_IVL, 50), (zmq.RECONNECT_IVL_MAX, 500)):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_REPLY_BYTES)
        self._socket.connect(f"ipc://{run_dir}/control.sock")
        self._fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._drain)
        self._timer = loop.call_soon(self._tick)

    def close(self) -> None:
        self._timer.cancel()
        self._fail_pending(lambda _: True)
        self._loop.remove_reader(self._fd)
        self._socket.close()

    async def register(self, body: bytes) -> wire.Reply:
        """`POST /register`, body as it came. Raises `SchedulerAway`."""
        return await self._call(lambda number: wire.Register(number, body))

    async def drain(self, url: str, *, resume: bool) -> wire.Reply:
        """Raises `SchedulerAway`."""
        return await self._call(lambda number: wire.Drain(number, url, resume))

    async def abort_requests(self, body: bytes) -> wire.Reply:
        """`POST /v1/abort_requests`, body as it came. Raises `SchedulerAway`."""
        return await self._call(lambda number: wire.AbortRequests(number, body))

    async def check_health(self) -> wire.Reply:
        """`GET /health_generate`. Raises `SchedulerAway`."""
        return await self._call(wire.CheckHealth)

    async def show_cluster(self) -> wire.Reply:
        """Who shares with this host. Raises `SchedulerAway`."""
        return await self._call(wire.ShowCluster)

    async def explain_request(self, ident: str) -> wire.Reply:
        """`GET /explain/ID`. Raises `SchedulerAway`."""
        return await self._call(lambda number: wire.Explain(number, ident))

    def offer(self, tickets: wire.Tickets) -> bool:
        """Tells the queue, without waiting; False when the scheduler is not connected, or takes no more."""
        return self._send(tickets)

    def note(self, notices: wire.RoutingNotices) -> bool:
        """For the prefix index, without waiting; False: lost. Nothing is queued for a scheduler that stands."""
        return self._table.alive(time.monotonic_ns()) and self._send(notices)

    async def _call(self, message: Callable[[int], wire.FrontendToScheduler]) -> wire.Reply:
        number = next(self._numbers)
        if not await self._sent(message(number)):
            raise _away()
        answer: asyncio.Future[wire.Reply] = self._loop.create_future()
        self._pending[number] = _Pending(answer, self._table.epoch)
        try:
            async with asyncio.timeout(self._limit_s):
                return await answer
        except TimeoutError as e:
            raise SchedulerAway(f"the scheduler gave no answer within {self._limit_s:g} s") from e
        finally:
            self._pending.pop(number, None)

    async def _sent(self, message: wire.FrontendToScheduler) -> bool:
        """False when there is no scheduler. One that lives and is not connected yet, as right after its start or ours,
        is waited for."""
        deadline = self._loop.time() + CONNECT_S
        while self._table.alive(time.monotonic_ns()):
            if self._send(message):
                return True
            if self._loop.time() > deadline:
                break
            await asyncio.sleep(CONNECT_LOOK_S)
        return False

    def _send(self, message: wire.FrontendToScheduler) -> bool:
        """False when the scheduler is not connected, or takes no more."""
        try:
            self._socket.send(wire.encode(message), _NOBLOCK)
        except zmq.Again:
            return False
        # The FD signals edges, and a send may have used one up: what arrived meanwhile would lie there unseen.
        self._loop.call_soon(self._drain)
        return True

    def _drain(self) -> None:
        if self._socket.closed:
            return
        while int(self._socket.getsockopt(zmq.EVENTS)) & _POLLIN:
            try:
                frames = self._socket.recv_multipart(_NOBLOCK)
            except zmq.Again:
                return
            try:
                self._hear(wire.decode(wire.to_frontend, frames[-1], wire.MAX_REPLY_BYTES))
            except WireError as error:
                self._bad_frames += 1
                if self._bad_frames == 1:
                    logger.warning("dropped a message of the scheduler: %s", error)

    def _hear(self, message: wire.SchedulerToFrontend) -> None:
        match message:
            case wire.Welcome(epoch=epoch):
                self._welcomed = epoch
            case wire.Grants():
                self.on_grants(message)
            case wire.Reply(call=call):
                if (pending := self._pending.get(call)) is not None and not pending.answer.done():
                    pending.answer.set_result(message)
            case wire.EndRequests(ask=ask, ids=ids, every=every):
                ended = self.end_requests(None if every else ids)
                for start in range(0, max(len(ended), 1), ENDED_AT_ONCE):
                    rest = start + ENDED_AT_ONCE
                    self._send(wire.Ended(ask, ended[start:rest], more=rest < len(ended)))
            case wire.TellDecisions(ask=ask, ident=ident):
                requests = self.explain(ident)
                for number, told in enumerate(requests, 1):
                    self._send(wire.Decided(ask, [told], more=number < len(requests)))
                if not requests:
                    self._send(wire.Decided(ask, []))

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._tick)
        epoch = self._table.epoch
        if epoch != self._epoch:
            logger.info("the scheduler is in its epoch %d", epoch)
            self._epoch = epoch
            self._on_epoch(epoch)
        if self._pending:
            alive = self._table.alive(time.monotonic_ns())
            self._fail_pending(lambda pending: not alive or pending.epoch != epoch)
        if self._welcomed != epoch and epoch:
            self._send(wire.FrontendHello(*self._who, epoch))  # said again until it is answered
        self._drain()  # an edge lost for any reason is found here

    def _fail_pending(self, concerned: Callable[[_Pending], bool]) -> None:
        for pending in self._pending.values():
            if concerned(pending) and not pending.answer.done():
                pending.answer.set_exception(_away())


def _away() -> PenstockError:
    return SchedulerAway("the scheduler is away; serving goes on, but instances cannot be changed for the moment")
