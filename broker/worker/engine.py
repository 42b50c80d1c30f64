"""A native engine's side of the data socket, and its frontends.

    frontends  --- ROUTER (bound) --- requests in; one step message per frontend and turn of the loop out
    scheduler  --- see link.py

What runs a request is somebody else's business: a `Runner` is told of requests and aborts, and calls `emit`,
`finish` and `fail`. `serve` is one (an async generator per request); an engine with its own batching loop is another
and calls `flush_step` at the end of each step. Everything happens on the event loop's thread. The loop must turn more
often than `wire.DEAD_AFTER_S`, or the engine is held for dead: long work belongs into a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence

import zmq

from broker import wire
from broker.errors import WireError
from broker.port import Frames, Port
from broker.types import Role
from broker.worker import endpoints
from broker.worker.calls import Call, Frontend, Runner
from broker.worker.link import Link
from broker.worker.outbox import STEP_BYTES, Delta
from broker.worker.request import EngineError, Request

log = logging.getLogger(__name__)

RETRY_S = 0.005
"""A frontend that took no more is tried again after this long."""
MOST_BYTES = 128 * 1024 * 1024
"""A frame larger than this ends its connection (and than `max_body_bytes`, if that is more)."""
FORGET_AFTER_S = 60.0
"""A frontend that has been silent for this long and has nothing under way is forgotten."""
SEND_MARK = 256
"""Step messages that may wait in ZMQ for one frontend; beyond it they gather in its outbox."""


class Engine:
    """One life of an engine. Create it inside a running event loop; `start`, then `stop`, and that is all."""

    def __init__(
        self,
        runner: Runner,
        *,
        router: str,
        models: Sequence[str] = (),
        role: Role = Role.MIXED,
        capacity: int = 0,
        transfer: bytes = b"",
        bind: str = "",
        name: str = "",
        max_body_bytes: int = 64 * 1024 * 1024,
        max_held_bytes: int = 8 * 1024 * 1024,
    ) -> None:
        """Binds the data socket, so that `endpoint` is known at once. Raises `zmq.ZMQError` or ValueError.

        `capacity`: requests it runs at once, 0 = it does not say. `bind`: see `endpoints.default_bind`. `name`: what
        lists call it.
        `max_held_bytes`: what may wait for one frontend that does not read, beyond which its requests are ended.
        """
        if len(transfer) > wire.MAX_TRANSFER_BYTES:
            raise ValueError(f"transfer metadata of {len(transfer)} bytes, the limit is {wire.MAX_TRANSFER_BYTES}")
        self.incarnation = new_incarnation()
        self.foreign_frames = 0
        """Frames dropped because they were malformed or from a stranger."""
        self._runner = runner
        self._router = router
        self._max_body_bytes = max_body_bytes
        self._max_held_bytes = max_held_bytes
        self._loop = asyncio.get_running_loop()
        self._frontends: dict[bytes, Frontend] = {}
        self._touched: set[Frontend] = set()
        self._flush_due = False
        self._retry: asyncio.TimerHandle | None = None
        self._leaving = False
        self._idle = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

        self._context = zmq.Context()
        try:
            self.data, bound = self._bind(bind or endpoints.default_bind(router, self.incarnation))
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self.endpoint = endpoints.advertised(bound, router)
        hello = wire.EngineHello(
            wire.PROTOCOL, self.incarnation, self.endpoint, role, list(models), capacity, transfer, name
        )
        self._link = Link(self._loop, self._context, router, hello, runner.load)

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to look for Penstock and to serve whoever comes."""
        self._link.start()
        self._task = self._loop.create_task(self._watch())

    @property
    def is_registered(self) -> bool:
        return self._link.is_registered

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits to be sent."""
        return all(not f.calls and f.outbox.is_empty for f in self._frontends.values())

    def set_ready(self, ready: bool) -> None:
        """False takes the engine out of the choice from its next beat on, until it is true again."""
        self._link.set_ready(ready)

    def set_publishing(self, publishing: bool) -> None:
        """False keeps the load to ourselves (for tests of Penstock: a real engine has no reason to)."""
        self._link.publishing = publishing

    async def stop(self, drain_s: float = 0.0) -> None:
        """Says goodbye, lets what runs go on for `drain_s`, ends the rest with ERROR 503, and closes everything."""
        self._leaving = True
        self._link.leave()
        self._note_idle()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), drain_s)
        for frontend in list(self._frontends.values()):
            self._end_all(frontend, EngineError(503, "the engine is shutting down"))
        self.flush_step()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._retry is not None:
            self._retry.cancel()
        self.data.close(linger_ms=500)
        await self._link.close()
        self._context.term()

    # -- answers -------------------------------------------------------------------------------------------

    def emit(self, call: Call, data: bytes) -> None:
        """Bytes for the client, as they are. Leaves with the others of this turn of the loop, or at `flush_step`."""
        if data and not call.ended:
            self._cut(call, data, wire.CHUNK)

    def finish(self, call: Call, data: bytes = b"") -> None:
        """The last bytes of the answer, possibly none."""
        if not call.ended:
            self._cut(call, data, wire.DONE)
            self._forget(call)

    def fail(self, call: Call, error: EngineError) -> None:
        """The answer will never be whole. Before any `emit` the client gets the status, later an error event."""
        if not call.ended:
            self._put(call.frontend, (call.number, call.sequence, wire.ERROR, error.body(), error.status))
            self._forget(call)

    def flush_step(self) -> None:
        """Sends what the step gathered: one message per frontend."""
        touched, self._touched = self._touched, set()
        for frontend in touched:
            if not frontend.stalled:
                self._send(frontend)

    def load_changed(self) -> None:
        """The runner's counts are others now; published within `link.LOAD_AT_MOST_EVERY_S`."""
        self._link.load_changed()

    def _cut(self, call: Call, data: bytes, last: int) -> None:
        """One delta; before it CHUNKs of a megabyte when the data are larger than a message should be."""
        at = 0
        while len(data) - at > STEP_BYTES:
            self._put(call.frontend, (call.number, call.sequence, wire.CHUNK, data[at : at + STEP_BYTES]))
            call.sequence += 1
            at += STEP_BYTES
        self._put(call.frontend, (call.number, call.sequence, last, data[at:] if at else data))
        call.sequence += 1

    def _put(self, frontend: Frontend, delta: Delta) -> None:
        frontend.outbox.put(delta)
        self._touched.add(frontend)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush_turn)

    def _flush_turn(self) -> None:
        """Runs after every callback that was ready with the first `_put`: their deltas make one step."""
        self._flush_due = False
        self.flush_step()

    def _forget(self, call: Call) -> None:
        call.ended = True
        if call.frontend.calls.get(call.number) is call:
            del call.frontend.calls[call.number]
        self._note_idle()

    def _note_idle(self) -> None:
        if self._leaving and self.is_idle:
            self._idle.set()

    def _send(self, frontend: Frontend) -> None:
        def send(message: bytes) -> bool:
            try:
                self.data.send([frontend.identity, message])
            except zmq.Again:
                return False
            return True

        try:
            frontend.stalled = not frontend.outbox.flush(send)
        except zmq.ZMQError as e:
            if e.errno != zmq.EHOSTUNREACH:
                raise
            self._lose(frontend)  # its connection is gone, and with it whoever waited
            return
        if not frontend.stalled:
            self._note_idle()
            return
        held = frontend.outbox.held_bytes
        if held > 2 * self._max_held_bytes:  # even the refusals of its new requests pile up
            log.error("a frontend sends and never reads: forgotten")
            self._lose(frontend)
            return
        if held > self._max_held_bytes and frontend.calls:
            log.warning("a frontend does not read: %d requests ended", len(frontend.calls))
            # What is held stays: it may hold the ends of other answers, and nothing is added to it any more.
            self._end_all(frontend, EngineError(503, "the frontend did not read the answer"))
        if self._retry is None:
            self._retry = self._loop.call_later(RETRY_S, self._send_stalled)

    def _send_stalled(self) -> None:
        self._retry = None
        for frontend in [f for f in self._frontends.values() if f.stalled]:
            self._send(frontend)

    def _end_all(self, frontend: Frontend, error: EngineError) -> None:
        for call in list(frontend.calls.values()):
            self.fail(call, error)
            self._runner.abort(call)

    def _lose(self, frontend: Frontend) -> None:
        """Forgets a frontend that cannot be reached; its requests are aborted without an answer."""
        self._frontends.pop(frontend.identity, None)
        self._touched.discard(frontend)
        frontend.stalled = False
        frontend.outbox.clear()
        for call in list(frontend.calls.values()):
            self._forget(call)
            self._runner.abort(call)

    # -- frontends -----------------------------------------------------------------------------------------

    def _bind(self, endpoint: str) -> tuple[Port, str]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))  # not always: IPv4 would come out as ::ffff:a.b.c.d
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a frontend that reconnects may come before its old end is noticed
        socket.setsockopt(zmq.SNDHWM, SEND_MARK)
        # A larger frame ends the connection with all its requests; what is only a little too large gets a 413.
        socket.setsockopt(zmq.MAXMSGSIZE, max(self._max_body_bytes, MOST_BYTES))
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.bind(endpoint)
        bound = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        return Port(self._loop, socket, self._receive_data), bound.rstrip(b"\0").decode()

    def _receive_data(self, frames: Frames) -> None:
        now = self._now()
        frontend = self._frontends.get(frames[0])
        if frontend is None:
            frontend = self._frontends[frames[0]] = Frontend(frames[0], self.incarnation, now)
        try:
            self._understand(frontend, frames, now)
        except WireError as e:
            self.foreign_frames += 1
            if not frontend.complained:
                frontend.complained = True
                log.warning("dropped a frame of peer %s: %s (said once)", frames[0].hex(), e)

    def _understand(self, frontend: Frontend, frames: Frames, now: float) -> None:
        if not 2 <= len(frames) <= 3:
            raise WireError(f"{len(frames) - 1} frames")
        message = wire.decode(wire.data_to_engine, frames[1])
        if len(frames) != (3 if isinstance(message, wire.Request) else 2):
            raise WireError(f"{type(message).__name__} with {len(frames) - 1} frames")
        frontend.heard = now
        match message:
            case wire.Ping():
                self._reply(frontend, wire.Pong(self.incarnation))
            case wire.DataHello(protocol=protocol, epoch=epoch):
                frontend.welcome = protocol == wire.PROTOCOL
                self._reply(frontend, wire.DataWelcome(wire.PROTOCOL, self.incarnation))
                self._link.notice_epoch(epoch)
            case wire.Abort(ids=ids):
                for number in ids:
                    if (call := frontend.calls.get(number)) is not None:
                        self._forget(call)
                        self._runner.abort(call)
            case wire.Request():
                self._open(frontend, message, frames[2])

    def _open(self, frontend: Frontend, message: wire.Request, body: bytes) -> None:
        request = Request(
            f"{frontend.identity.hex()[-8:]}-{message.id}",
            message.path,
            body,
            stream=message.stream,
            headers=message.headers,
            transfer=message.transfer,
        )
        call = Call(frontend, message.id, request)
        try:
            if message.incarnation != self.incarnation:
                raise EngineError(409, "this request is for another incarnation of the engine")
            if not frontend.welcome:
                raise EngineError(409, f"say hello in protocol {wire.PROTOCOL} first")
            if self._leaving:
                raise EngineError(503, "the engine is shutting down")
            if frontend.outbox.held_bytes > self._max_held_bytes:
                raise EngineError(503, "the frontend does not read its answers")
            if len(body) > self._max_body_bytes:
                raise EngineError(413, f"body of {len(body)} bytes, the limit is {self._max_body_bytes}")
            if message.id in frontend.calls:
                raise WireError(f"request {message.id} is under way already")
            frontend.calls[message.id] = call
            self._runner.open(call)
        except EngineError as e:
            self.fail(call, e)
        except WireError:
            raise
        except Exception:
            log.exception("the runner failed on %r", request)
            self.fail(call, EngineError(500, "the engine failed on this request"))

    def _reply(self, frontend: Frontend, message: wire.EngineToFrontend) -> None:
        """Not worth keeping: a frontend that cannot take it asks again."""
        try:
            self.data.send([frontend.identity, wire.encode(message)])
        except zmq.ZMQError as e:
            if e.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise

    # -- silence -------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        last = self._now()
        while True:
            self.data.drain()
            now = self._now()
            if now - last < wire.BEAT_S:  # otherwise it was us who slept, and their pings are still unread
                self._judge_silence(now)
            last = now
            await asyncio.sleep(wire.BEAT_S / 5)

    def _judge_silence(self, now: float) -> None:
        for frontend in list(self._frontends.values()):
            silence = now - frontend.heard
            if silence > wire.DEAD_AFTER_S and frontend.calls:
                log.warning("a frontend is silent: %d requests aborted", len(frontend.calls))
                # Told all the same: a frontend that was only stopped reads it when it wakes.
                self._end_all(frontend, EngineError(503, "the frontend was silent"))
            elif silence > FORGET_AFTER_S:
                self._lose(frontend)

    def _now(self) -> float:
        return time.monotonic()


def new_incarnation() -> bytes:
    """16 random bytes. The first is never zero: ZMQ keeps such routing ids for itself."""
    raw = os.urandom(wire.INCARNATION_BYTES)
    return raw if raw[0] else b"\x01" + raw[1:]
