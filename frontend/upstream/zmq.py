"""The native transport: one ROUTER socket for all native engines (docs/wire.md).

    open -> DataHello (first use), Request + body      sent at once
    FD readable -> drain a batch: Step -> calls -> one write per client
    every BEAT_S: Ping to each, silence judged

A connection is a life: it is made once, under routing ids of its own, and never silently made again, because
what was sent or on its way when it broke is lost, and a request lost without a word would wait for ever. libzmq's
own reconnecting is put off for weeks; a `Monitor` tells when a connection broke, silence when it only seems to live.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
import zmq

from broker import wire
from broker.config import Config
from broker.errors import (
    UNDECODABLE,
    BadRequest,
    ConnectFailed,
    EngineSaturated,
    PenstockError,
    UpstreamBroken,
    WireError,
)
from broker.types import Instance
from frontend.upstream.base import HOP_BY_HOP, Call, Headers, Sink, UpstreamRequest
from frontend.upstream.zmq_call import ZmqCall
from frontend.upstream.zmq_monitor import Monitor

log = logging.getLogger(__name__)

BATCH = 256
"""Messages read in one turn of the loop; clients' sockets get their turn in between."""
MARK = 4096
"""Messages queued to or from one engine. At the mark a request is refused (EAGAIN), never dropped."""
MAX_MESSAGE_BYTES = 128 * 1024 * 1024

# Plain ints: pyzmq's enums cost several per cent of a request in flag arithmetic.
_EVENTS, _POLLIN, _RCVMORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)
_NOBLOCK, _SNDMORE = int(zmq.NOBLOCK), int(zmq.SNDMORE)
_NOBLOCK_MORE = _NOBLOCK | _SNDMORE

_NOT_SENT = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"accept-encoding"}
"""Headers that mean nothing to an engine which reads the body from a frame and never compresses."""

_decode = msgspec.msgpack.Decoder(list).decode


@dataclass(slots=True, eq=False)
class Peer:
    """One connection to one life of an engine."""

    url: str
    endpoint: str
    """The URL as libzmq names it in events."""
    incarnation: bytes
    routing_id: bytes
    connected_at: float
    heard_at: float
    welcomed: bool = False
    retired: bool = False
    """Removed; kept for the calls still open there."""
    complained: bool = False
    """One of its frames was dropped, and the log has said so."""
    aborts: list[int] = field(default_factory=list)
    """Requests it need not go on with; told together at the end of the turn."""


@dataclass(slots=True)
class Dropped:
    """Frames that were not used, by reason. Counters: they only grow."""

    malformed: int = 0
    foreign_incarnation: int = 0
    unknown_peer: int = 0


class ZmqUpstream:
    """`Upstream` for native engines. Create it on the running loop that it will live on."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        config: Config,
        *,
        batch: int = BATCH,
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        """`context`: the process's only one; its owner ends it after `close`. `on_drop` counts each frame not used."""
        self.dropped = Dropped()
        self._on_drop = on_drop
        self.epoch = 0
        """The scheduler's, as told in DataHello."""
        self._connect_s = config.timeouts.connect_secs
        self._bound = config.upstream.stream_buffer_bytes
        self._batch = batch
        self._loop = asyncio.get_running_loop()
        self._peers: dict[str, Peer] = {}
        """By URL: one life at a time is believed to be at an endpoint."""
        self._routes: dict[bytes, Peer] = {}
        self._calls: dict[int, ZmqCall] = {}
        """Every call that has not heard its end, paused ones included."""
        self._ready: deque[ZmqCall] = deque()
        """Calls with something to deliver at the end of the turn."""
        self._aborting: set[Peer] = set()
        self._broken: list[Peer] = []
        self._next_id = 0
        self._lives = 0
        self._turn_due = False
        self._closed = False
        self._socket = _router(context)
        self._monitor = Monitor(self._socket, self._loop, self._broke)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._turn)
        self._last_beat = self._loop.time()
        self._beat_timer = self._loop.call_later(wire.BEAT_S, self._beat)

    def __repr__(self) -> str:
        return f"<ZmqUpstream peers={len(self._peers)} calls={len(self._calls)} dropped={self.dropped}>"

    def open(self, instance: Instance, request: UpstreamRequest, sink: Sink) -> Call:
        self._next_id += 1
        number = self._next_id
        call = self._calls[number] = ZmqCall(number, sink, self, stream=request.stream, bound=self._bound)
        try:
            if self._closed:
                raise ConnectFailed("the frontend is closing")
            peer = self._connected(instance)
            self._send_request(peer, number, request)
            call.peer = peer
        except PenstockError as e:
            call.fail(e)
            self.deliver_soon(call)
        self._turn_soon()  # the send may have used up the FD's signal of a message to read
        return call

    def see(self, instances: Iterable[Instance]) -> None:
        """Connects to the native ones among these already, so that the first request need not."""
        for instance in instances:
            if instance.is_native and not self._closed:
                try:
                    self._connected(instance)
                except ConnectFailed as e:
                    log.warning("cannot connect to %s: %s", instance.url, e)
        self._turn_soon()

    def forget(self, incarnation: bytes) -> None:
        """That life of an engine was removed: answers under way go on, then its connection is ended."""
        for peer in [p for p in self._peers.values() if p.incarnation == incarnation]:
            peer.retired = True
            self._end_if_idle(peer)

    def resync(self, epoch: int) -> None:
        """A new scheduler: every engine is told, so that it registers there."""
        self.epoch = epoch
        for peer in list(self._peers.values()):
            self._say(peer, wire.DataHello(wire.PROTOCOL, epoch))

    def close(self) -> None:
        """Ends every connection; calls still open hear `fail`. The transport is of no more use."""
        if self._closed:
            return
        self._closed = True
        self._beat_timer.cancel()
        self._loop.remove_reader(self._fd)
        self._monitor.close()
        self._socket.close(linger=0)
        self._peers.clear()
        self._routes.clear()
        self._aborting.clear()
        self._ready.clear()
        calls = list(self._calls.values())
        self._calls.clear()
        for call in calls:
            call.fail(UpstreamBroken("the frontend is closing"))
            call.deliver()

    # -- what calls report ---------------------------------------------------------------------------------

    def deliver_soon(self, call: ZmqCall) -> None:
        self._ready.append(call)
        self._turn_soon()

    def abort(self, call: ZmqCall) -> None:
        peer = call.peer
        if isinstance(peer, Peer) and peer.routing_id in self._routes:
            peer.aborts.append(call.id)
            self._aborting.add(peer)
            self._turn_soon()

    def release(self, call: ZmqCall) -> None:
        self._calls.pop(call.id, None)

    # -- turns of the loop ---------------------------------------------------------------------------------

    def _turn_soon(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        """Reads a batch, tells the clients, sends the aborts.

        The FD signals edges, and any call on the socket may use a signal up: so EVENTS is looked at until it
        says that there is nothing more, and again after a turn that sent something or stopped at its limit.
        """
        self._turn_due = False
        ready = self._ready
        whole = False
        try:
            if not self._closed:
                self._read()
            for _ in range(len(ready)):
                ready.popleft().deliver()
            whole = True
        finally:  # a bug in one client's sink must not keep the others' bytes back, nor what is still unread
            if ready or not whole:
                self._turn_soon()
        if self._aborting:
            self._send_aborts()

    def _read(self) -> None:
        socket = self._socket
        recv = socket.recv
        get = cast("Callable[[int], int]", socket.getsockopt)
        now = self._loop.time()
        for _ in range(self._batch):
            if not get(_EVENTS) & _POLLIN:
                break
            route = recv(_NOBLOCK)
            frame = recv(_NOBLOCK)
            whole = True
            while get(_RCVMORE):
                recv(_NOBLOCK)
                whole = False
            peer = self._routes.get(route)
            if peer is None:
                self.dropped.unknown_peer += 1
                self._on_drop()
                continue
            peer.heard_at = now
            try:
                if not whole:
                    raise WireError("more than one frame")
                self._understand(peer, frame)
            except WireError as e:
                self.dropped.malformed += 1
                self._on_drop()
                self._complain(peer, e)
        else:
            self._turn_soon()
            return
        if self._broken:
            broken, self._broken = self._broken, []
            for peer in broken:
                self._lose(peer, f"the connection to {peer.url} broke")

    def _understand(self, peer: Peer, frame: bytes) -> None:
        """One message of an engine. Raises `WireError` for what is none."""
        try:
            fields = _decode(frame)
        except UNDECODABLE as e:
            raise WireError(f"malformed message: {e}") from e
        if fields and fields[0] == wire.STEP_TAG:
            if len(fields) < 3 or type(fields[1]) is not bytes or type(fields[2]) is not list:
                raise WireError("malformed step")
            if fields[1] != peer.incarnation:
                self.dropped.foreign_incarnation += 1
                self._on_drop()
                return
            self._step(peer, fields[2])
            return
        message = wire.decode(wire.data_to_frontend, frame)
        if message.incarnation != peer.incarnation:
            self.dropped.foreign_incarnation += 1
            self._on_drop()
            if type(message) is wire.DataWelcome:
                self._lose(peer, f"another life of the engine answers at {peer.url}")
        elif type(message) is wire.DataWelcome:
            if message.protocol == wire.PROTOCOL:
                peer.welcomed = True
            else:
                self._lose(peer, f"{peer.url} speaks protocol {message.protocol}, we speak {wire.PROTOCOL}")

    def _step(self, peer: Peer, deltas: Sequence[object]) -> None:
        """The deltas of one engine step. One that cannot be read is no reason to drop the others."""
        calls, ready = self._calls, self._ready
        malformed = 0
        for delta in deltas:
            if type(delta) is not list or len(delta) < 4 or type(delta[0]) is not int:
                malformed += 1
                continue
            call = calls.get(delta[0])
            # Unknown: it was aborted, and this was on its way. Another engine's: none of this one's business.
            if call is not None and call.peer is peer and call.take(delta):
                ready.append(call)
        if malformed:
            raise WireError(f"{malformed} malformed deltas in a step")

    def _complain(self, peer: Peer, error: WireError) -> None:
        if not peer.complained:
            peer.complained = True
            log.warning("dropped a frame of %s: %s (said once)", peer.url, error)

    # -- connections ---------------------------------------------------------------------------------------

    def _connected(self, instance: Instance) -> Peer:
        """The connection to this life of the engine, made and greeted if there is none yet."""
        peer = self._peers.get(instance.url)
        if peer is not None:
            if peer.incarnation == instance.incarnation:
                peer.retired = False
                return peer
            self._lose(peer, f"another life of the engine is at {peer.url}")
        if len(instance.incarnation) != wire.INCARNATION_BYTES:
            raise ConnectFailed(f"{instance.url} is registered without an incarnation")
        self._lives += 1
        # The number makes it a name that this socket never had: libzmq ends the process when a routing id is
        # given twice, and that of a connection just ended lives on until its I/O thread has taken leave.
        route = instance.incarnation + self._lives.to_bytes(4, "big")
        socket = self._socket
        # Our own name is new, too: an engine need not know that the old connection is dead to take a new one.
        socket.setsockopt(zmq.ROUTING_ID, b"F" + secrets.token_bytes(15))
        socket.setsockopt(zmq.CONNECT_ROUTING_ID, route)
        try:
            socket.connect(instance.url)
        except zmq.ZMQError as e:
            raise ConnectFailed(f"cannot connect to {instance.url}: {e}") from e
        endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        now = self._loop.time()
        peer = Peer(instance.url, endpoint.rstrip(b"\0").decode(), instance.incarnation, route, now, now)
        self._peers[instance.url] = peer
        self._routes[route] = peer
        self._say(peer, wire.DataHello(wire.PROTOCOL, self.epoch))
        return peer

    def _lose(self, peer: Peer, why: str) -> None:
        """Ends a connection. Its calls hear of it in a later turn: whoever is calling may be one of them."""
        if self._routes.pop(peer.routing_id, None) is None:
            return
        del self._peers[peer.url]
        self._aborting.discard(peer)
        self._monitor.forget(peer.endpoint)
        try:
            self._socket.disconnect(peer.url)
        except zmq.ZMQError as e:
            if e.errno != errno.ENOENT:  # libzmq has ended it already: the handshake failed
                raise
        for call in [c for c in self._calls.values() if c.peer is peer]:
            call.fail(UpstreamBroken(why) if peer.welcomed else ConnectFailed(why))
            self.deliver_soon(call)

    def _end_if_idle(self, peer: Peer) -> None:
        if not any(call.peer is peer for call in self._calls.values()):
            self._lose(peer, f"{peer.url} was removed")

    def _broke(self, endpoint: str) -> None:
        self._broken += [p for p in self._peers.values() if p.endpoint == endpoint]
        self._turn_soon()

    def _beat(self) -> None:
        now = self._loop.time()
        self._beat_timer = self._loop.call_later(wire.BEAT_S, self._beat)
        slept = now - self._last_beat - wire.BEAT_S
        self._last_beat = now
        if slept > wire.BEAT_S:
            # We were stopped or starved; what the engines said meanwhile is still unread, and they are not to blame.
            for peer in self._peers.values():
                peer.heard_at += slept
                peer.connected_at += slept
        for peer in list(self._peers.values()):
            if not peer.welcomed and now - peer.connected_at > self._connect_s:
                self._lose(peer, f"{peer.url} did not answer within {self._connect_s:g} s")
            elif peer.welcomed and now - peer.heard_at > wire.DEAD_AFTER_S:
                self._lose(peer, f"{peer.url} was silent for {wire.DEAD_AFTER_S:g} s")
            else:
                self._say(peer, wire.Ping())
                if peer.retired:
                    self._end_if_idle(peer)

    # -- sending -------------------------------------------------------------------------------------------

    def _send_request(self, peer: Peer, number: int, request: UpstreamRequest) -> None:
        """Raises, and then nothing was sent."""
        head = wire.encode(
            wire.Request(
                peer.incarnation,
                number,
                request.path,
                request.stream,
                _plain(request.headers),
                request.transfer,
            )
        )
        if len(head) > wire.MAX_CONTROL_BYTES:
            raise BadRequest(f"the headers of the request are larger than {wire.MAX_CONTROL_BYTES} bytes")
        if len(request.body) > MAX_MESSAGE_BYTES:
            raise BadRequest(f"the body of the request is larger than {MAX_MESSAGE_BYTES} bytes")
        send = self._socket.send
        try:
            send(peer.routing_id, _NOBLOCK_MORE)  # fails here or not at all: a message is taken whole
        except zmq.Again as e:
            raise EngineSaturated(f"{peer.url} takes no more messages now") from e
        except zmq.ZMQError as e:
            self._lose(peer, f"the connection to {peer.url} broke")
            raise ConnectFailed(f"{peer.url} cannot be reached: {e}") from e
        send(head, _NOBLOCK_MORE)
        send(request.body, _NOBLOCK, copy=False)  # copied all the same below pyzmq's threshold

    def _say(self, peer: Peer, message: wire.FrontendToEngine) -> None:
        """A message that may be lost at a mark, because it is said again or silence says the same."""
        try:
            self._socket.send(peer.routing_id, _NOBLOCK_MORE)
            self._socket.send(wire.encode(message), _NOBLOCK)
        except zmq.Again:
            pass
        except zmq.ZMQError:
            self._lose(peer, f"the connection to {peer.url} broke")
        self._turn_soon()

    def _send_aborts(self) -> None:
        """One message for each engine; one that takes none now is asked again after the next beat."""
        for peer in list(self._aborting):
            try:
                self._socket.send(peer.routing_id, _NOBLOCK_MORE)
            except zmq.Again:
                continue
            except zmq.ZMQError:
                self._lose(peer, f"the connection to {peer.url} broke")
                continue
            self._socket.send(wire.encode(wire.Abort(peer.aborts)), _NOBLOCK)
            peer.aborts = []
            self._aborting.discard(peer)
            self._turn_soon()


def _router(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, MARK)
    socket.setsockopt(zmq.RCVHWM, MARK)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, 2**31 - 1)  # not -1: that drops what was received but not yet read
    socket.setsockopt(zmq.IPV6, 1)
    return socket


def _plain(headers: Headers) -> dict[str, str]:
    """Names and values as text; a header sent several times as one list (RFC 9110, 5.3)."""
    plain: dict[str, str] = {}
    for name, value in headers:
        if name not in _NOT_SENT:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            plain[key] = f"{plain[key]}, {text}" if key in plain else text
    return plain
