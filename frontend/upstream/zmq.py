"""The native transport: requests to native engines and their answers, over one ROUTER socket (docs/wire.md).

open -> DataHello (first use), Request + body      sent at once
FD readable -> drain a batch: Step -> calls -> one write per client

zmq.py            this: what is sent and heard
zmq_peers.py      the connections
zmq_monitor.py    tells when one broke
zmq_call.py       one request at one engine                                pure
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import zmq

from broker import wire
from broker.config import Config
from broker.errors import (
    UNDECODABLE,
    BadRequest,
    ConnectFailed,
    PenstockError,
    UpstreamBroken,
    WireError,
)
from broker.types import Instance
from frontend.upstream.base import HOP_BY_HOP, AnswerHead, Call, Headers, Sink, UpstreamRequest
from frontend.upstream.zmq_call import JSON, ZmqCall
from frontend.upstream.zmq_peers import MAX_MESSAGE_BYTES, Peer, Peers

log = logging.getLogger(__name__)

BATCH = 256
"""Messages read in one turn of the loop; clients' sockets get their turn in between."""

# Plain ints: pyzmq's enums cost several per cent of a request in flag arithmetic.
_EVENTS, _POLLIN, _RCVMORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)
_NOBLOCK = int(zmq.NOBLOCK)

_NOT_SENT = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"accept-encoding"}
"""Headers that mean nothing to an engine which reads the body from a frame and never compresses."""

_decode = msgspec.msgpack.Decoder(list).decode


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
        self._bound = config.upstream.stream_buffer_bytes
        self._batch = batch
        self._loop = asyncio.get_running_loop()
        self._peers = Peers(context, self, config.timeouts.connect_secs, self._loop)
        self._socket = self._peers.socket
        self._calls: dict[int, ZmqCall] = {}
        """Every call that has not heard its end, paused ones included."""
        self._ready: deque[ZmqCall] = deque()
        """Calls with something to deliver at the end of the turn."""
        self.whole = AnswerHead([*JSON, (b"content-length", b"")])
        self._next_id = 0
        self._turn_due = False
        self._closed = False
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self.turn_soon)  # one turn for what engines and clients bring at once

    def __repr__(self) -> str:
        return f"<ZmqUpstream peers={len(self._peers)} calls={len(self._calls)} dropped={self.dropped}>"

    def open(self, instance: Instance, request: UpstreamRequest, sink: Sink) -> Call:
        self._next_id += 1
        number = self._next_id
        heard: Any = sink
        call = self._calls[number] = ZmqCall(number, heard, hasattr(sink, "answer"), self, request.stream, self._bound)
        try:
            if self._closed:
                raise ConnectFailed("the frontend is closing")
            peer = self._peers.at(instance)
            self._send_request(peer, number, request)
            call.peer = peer
        except PenstockError as e:
            call.fail(e)
            self.deliver_soon(call)
        self.turn_soon()  # the send may have used up the FD's signal of a message to read
        return call

    def see(self, instances: Iterable[Instance]) -> None:
        """Connects to the native ones among these already, so that the first request need not."""
        for instance in instances:
            if instance.is_native and not self._closed:
                try:
                    self._peers.at(instance)
                except ConnectFailed as e:
                    log.warning("cannot connect to %s: %s", instance.url, e)
        self.turn_soon()

    def forget(self, incarnation: bytes) -> None:
        """That life of an engine was removed: answers under way go on, then its connection is ended."""
        self._peers.retire(incarnation)

    def resync(self, epoch: int) -> None:
        """A new scheduler: every engine is told, so that it registers there."""
        self._peers.resync(epoch)

    def close(self) -> None:
        """Ends every connection; calls still open hear `fail`. The transport is of no more use."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._fd)
        self._peers.close()
        self._ready.clear()
        calls = list(self._calls.values())
        self._calls.clear()
        for call in calls:
            call.fail(UpstreamBroken("the frontend is closing"))
            call.deliver()

    # -- what calls report ---------------------------------------------------------------------------------

    def deliver_soon(self, call: ZmqCall) -> None:
        self._ready.append(call)
        self.turn_soon()

    def abort(self, call: ZmqCall) -> None:
        peer = call.peer
        if isinstance(peer, Peer) and peer.routing_id in self._peers.by_route:
            peer.aborts.append(call.id)
            self._peers.aborting.add(peer)
            self.turn_soon()

    def release(self, call: ZmqCall) -> None:
        self._calls.pop(call.id, None)

    # -- what connections report ---------------------------------------------------------------------------

    def lost(self, peer: Peer, error: PenstockError) -> None:
        """Its calls hear of it in a later turn: whoever is calling may be one of them."""
        for call in [c for c in self._calls.values() if c.peer is peer]:
            call.fail(error)
            self.deliver_soon(call)

    def is_used(self, peer: Peer) -> bool:
        return any(call.peer is peer for call in self._calls.values())

    # -- turns of the loop ---------------------------------------------------------------------------------

    def turn_soon(self) -> None:
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
                self.turn_soon()
        if self._peers.aborting:
            self._peers.say_aborts()

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
            peer = self._peers.by_route.get(route)
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
            self.turn_soon()
            return
        self._peers.lose_broken()

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
                self._peers.lose(peer, f"another life of the engine answers at {peer.url}")
        elif type(message) is wire.DataWelcome:
            if message.protocol == wire.PROTOCOL:
                peer.welcomed = True
            else:
                self._peers.lose(peer, f"{peer.url} speaks protocol {message.protocol}, we speak {wire.PROTOCOL}")

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

    # -- sending -------------------------------------------------------------------------------------------

    def _send_request(self, peer: Peer, number: int, request: UpstreamRequest) -> None:
        """Raises, and then nothing was sent."""
        head = wire.encode(
            wire.Request(
                peer.incarnation,
                number,
                request.path,
                request.stream,
                _plain(request),
                request.transfer,
            )
        )
        if len(head) > wire.MAX_CONTROL_BYTES:
            raise BadRequest(f"the headers of the request are larger than {wire.MAX_CONTROL_BYTES} bytes")
        if len(request.body) > MAX_MESSAGE_BYTES:
            raise BadRequest(f"the body of the request is larger than {MAX_MESSAGE_BYTES} bytes")
        self._peers.ask(peer, head, request.body)


def _plain(request: UpstreamRequest) -> dict[str, str]:
    """The headers as an engine gets them."""
    forms = request.forms
    if forms is None:
        return _texts(request.headers)
    if forms.native is None:
        forms.native = _texts(request.headers[:-1] if request.ident else request.headers)
    if not request.ident:
        return forms.native
    return {**forms.native, "x-request-id": request.ident.decode("ascii")}


def _texts(headers: Headers) -> dict[str, str]:
    """Names and values as text; a header sent several times as one list (RFC 9110, 5.3)."""
    plain: dict[str, str] = {}
    for name, value in headers:
        if name not in _NOT_SENT:
            key, text = name.decode("latin-1"), value.decode("latin-1")
            plain[key] = f"{plain[key]}, {text}" if key in plain else text
    return plain
