"""An engine's link to the scheduler: finds it, registers, beats, publishes the load, and finds the next one.

scheduler  --- DEALER (connected) ---- hello, beats, goodbye      what to say when: session.py
scheduler  --- PUB (connected) ------- load
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import zmq

from broker import wire
from broker.errors import WireError
from broker.port import Frames, Port
from broker.worker import endpoints
from broker.worker.session import Phase, Session

log = logging.getLogger(__name__)

FETCH_EVERY_S = 1.0
LOAD_AT_MOST_EVERY_S = 0.02
LOAD_AT_LEAST_EVERY_S = 1.0


class Load(NamedTuple):
    """What an engine says of itself; -1 = not known."""

    running: int
    waiting: int
    waiting_tokens: int = -1
    kv_permille: int = -1


class Link:
    """Owner: the engine, whose ZMQ context it shares. `load` gives the counts at the moment it is called."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        router: str,
        hello: wire.EngineHello,
        load: Callable[[], Load],
    ) -> None:
        self.foreign_frames = 0
        self.publishing = True
        """False: the load is not published."""
        self._loop = loop
        self._context = context
        self._router = router
        self._incarnation = hello.incarnation
        self._session = Session(hello)
        self._tasks: list[asyncio.Task[None]] = []
        self._control: Port | None = None
        self._load = load
        self._load_socket: zmq.Socket[bytes] | None = None
        self._load_sequence = 0
        self._load_sent = Load(-1, -1)
        self._load_sent_at = -LOAD_AT_LEAST_EVERY_S
        self._load_timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._tasks = [self._loop.create_task(self._find()), self._loop.create_task(self._beat())]

    @property
    def is_registered(self) -> bool:
        return self._session.phase is Phase.JOINED

    def set_ready(self, ready: bool) -> None:
        self._session.ready = ready

    def notice_epoch(self, epoch: int) -> None:
        """A frontend named this epoch."""
        self._session.notice_epoch(epoch, time.monotonic())

    def load_changed(self) -> None:
        """Publishes soon: at once, or `LOAD_AT_MOST_EVERY_S` after the last time."""
        if self._load_timer is None:
            wait = self._load_sent_at + LOAD_AT_MOST_EVERY_S - time.monotonic()
            self._load_timer = self._loop.call_later(max(0.0, wait), self._publish)

    def leave(self) -> None:
        """Says goodbye; after it there is no beat any more."""
        self._say(self._session.leave())

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._load_timer is not None:
            self._load_timer.cancel()
        if self._control is not None:
            self._control.close(linger_ms=200)
        if self._load_socket is not None:
            self._load_socket.close(linger=0)

    async def _find(self) -> None:
        """Connects to a Penstock as soon as there is one, and to the next when its run is over."""
        complained = False
        while True:
            if self._control is None or self._session.is_silent(time.monotonic()):
                try:
                    found = await asyncio.to_thread(endpoints.fetch, self._router)
                    way = endpoints.choose(found, self._router)
                except endpoints.EndpointsError as e:
                    if not complained:
                        complained = True
                        log.warning("%s (tried again every %g s)", e, FETCH_EVERY_S)
                else:
                    complained = False
                    # Also when it is the way we have: its other end may be gone without a word (a host without power).
                    self._connect(way)
            await asyncio.sleep(FETCH_EVERY_S)

    def _connect(self, way: endpoints.Way) -> None:
        if self._control is not None:
            self._control.close()
        if self._load_socket is not None:
            self._load_socket.close(linger=0)
        control = self._context.socket(zmq.DEALER)
        control.setsockopt(zmq.LINGER, 0)
        control.setsockopt(zmq.IPV6, 1)
        control.setsockopt(zmq.ROUTING_ID, self._incarnation)
        control.setsockopt(zmq.SNDHWM, 16)
        control.setsockopt(zmq.IMMEDIATE, 1)  # beats to nobody are not worth keeping
        control.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        control.setsockopt(zmq.MAXMSGSIZE, wire.MAX_CONTROL_BYTES)
        control.connect(way.control)
        self._control = Port(self._loop, control, self._receive)
        load = self._context.socket(zmq.PUB)
        load.setsockopt(zmq.LINGER, 0)
        load.setsockopt(zmq.IPV6, 1)
        load.setsockopt(zmq.SNDHWM, 8)
        load.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        load.connect(way.load)
        self._load_socket = load
        self._session.connected(time.monotonic())

    def _receive(self, frames: Frames) -> None:
        try:
            if len(frames) != 1:
                raise WireError(f"{len(frames)} frames")
            message = wire.decode(wire.to_engine, frames[0])
        except WireError as e:
            if not self.foreign_frames:
                log.warning("dropped a frame of the scheduler: %s (said once)", e)
            self.foreign_frames += 1
            return
        before, refusal = self._session.phase, self._session.refusal
        self._session.hear(message, time.monotonic())
        if isinstance(message, wire.Refused) and message.reason != refusal:
            log.error("registration refused: %s", message.reason)
        if self.is_registered and before is not Phase.JOINED:
            log.info("registered with %s, epoch %d", self._router, self._session.epoch)
            self.load_changed()

    def _say(self, message: wire.EngineToScheduler) -> None:
        if self._control is not None:
            with contextlib.suppress(zmq.Again):  # the scheduler is away; what matters is said again
                self._control.send([wire.encode(message)])

    async def _beat(self) -> None:
        while True:
            now = time.monotonic()
            if (due := self._session.due(now)) is not None:
                self._say(due)
            if now - self._load_sent_at >= LOAD_AT_LEAST_EVERY_S:
                self._publish()
            await asyncio.sleep(wire.BEAT_S / 10)

    def _publish(self) -> None:
        if self._load_timer is not None:
            self._load_timer.cancel()
            self._load_timer = None
        load, now = self._load(), time.monotonic()
        if not self.publishing:
            return
        if load == self._load_sent and now - self._load_sent_at < LOAD_AT_LEAST_EVERY_S:
            return
        self._load_sent, self._load_sent_at = load, now
        if self._load_socket is not None:
            report = wire.encode(wire.Load(self._incarnation, *load))
            sequence = self._load_sequence.to_bytes(8, "big")
            self._load_sequence += 1
            self._load_socket.send_multipart([wire.LOAD_TOPIC, sequence, report], zmq.DONTWAIT)
