"""The native transport: requests to native engines and their answers (docs/wire.md).

open -> DataHello (first use), Request + body      sent at the end of the turn
bytes -> messages, a batch -> Step -> calls        and at its end one write per client

zmq.py            this: what is said and heard
zmq_peers.py      the connections, in ZeroMQ's protocol (broker/zmtp.py)
zmq_address.py    where they lead
zmq_request.py    what a request is on the wire                            pure
zmq_call.py       one request at one engine                                pure
zmq_errors.py     what engines say of their errors                         pure
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

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
from broker.zmtp import MAX_MESSAGE_BYTES
from frontend import conduit
from frontend.outbox import Outbox
from frontend.upstream.base import AnswerHead, Call, Sink, Upstream, UpstreamRequest
from frontend.upstream.zmq_call import JSON, ZmqCall
from frontend.upstream.zmq_peers import Peer, Peers
from frontend.upstream.zmq_request import encoded

if TYPE_CHECKING:
    from frontend._conduit import Conduit

log = logging.getLogger(__name__)

BATCH: Final = 256
"""Messages of one engine understood in one turn of the loop; clients' sockets get their turn in between."""

_decode: Final = msgspec.msgpack.Decoder(list).decode
_decode_step: Final = msgspec.msgpack.Decoder(tuple[int, bytes, list[tuple[int, int, int, bytes]]]).decode
"""A step without errors, which is nearly all that engines say. What does not fit is looked at piece by piece: there may
be a fifth value, or a malformed delta among good ones."""


@dataclass(slots=True)
class Dropped:
    """Frames that were not used, by reason. Counters: they only grow."""

    malformed: int = 0
    foreign_incarnation: int = 0


class ZmqUpstream(Upstream):
    """`Upstream` for native engines. Create it on the running loop that it will live on."""

    def __init__(
        self,
        config: Config,
        outbox: Outbox | None = None,
        *,
        batch: int = BATCH,
        on_drop: Callable[[], None] = lambda: None,
    ) -> None:
        """`outbox`: the process's, for what clients' sinks hear. `on_drop` counts each message not used."""
        self.dropped = Dropped()
        self._on_drop = on_drop
        self._bound = config.upstream.stream_buffer_bytes
        self._batch = batch
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox(self._loop) if outbox is None else outbox
        self._peers = Peers(self, config.timeouts.connect_secs, self._loop)
        self._calls: dict[int, ZmqCall] = {}
        """Every call that has not heard its end, paused ones included."""
        self._ready: list[ZmqCall] = []
        """Calls with something to deliver at the end of the turn."""
        self._unread: list[Peer] = []
        """Engines that sent more than a batch; nothing more is read of them until it is understood."""
        self.whole = AnswerHead([*JSON, (b"content-length", b"")])
        self._next_id = 0
        self._turn_due = False
        self._closed = False
        self._lends = conduit.compiled is not None

    def __repr__(self) -> str:
        return f"<ZmqUpstream peers={len(self._peers)} calls={len(self._calls)} dropped={self.dropped}>"

    def open(self, instance: Instance, request: UpstreamRequest, sink: Sink) -> Call:
        self._next_id += 1
        number = self._next_id
        call = ZmqCall(number, sink, self, self._bound, stream=request.stream)
        self._calls[number] = call
        try:
            if self._closed:
                raise ConnectFailed("the frontend is closing")
            peer = self._peers.at(instance)
            self._send_request(peer, number, request)
            call.peer = peer
        except PenstockError as e:
            call.fail(e)
            self.deliver_soon(call)
        self.turn_soon()
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
        self._peers.close()
        self._ready.clear()
        self._unread.clear()
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
        if isinstance(peer, Peer) and not peer.is_lost:
            peer.aborts.append(call.id)
            self._peers.aborting.add(peer)
            self.turn_soon()

    def lend(self, call: ZmqCall, conduit: Conduit) -> None:
        if isinstance(call.peer, Peer) and call.peer.conduits is not None:
            call.peer.conduits.add(call.id, conduit)

    def take_back(self, call: ZmqCall) -> None:
        if isinstance(call.peer, Peer) and call.peer.conduits is not None:
            call.peer.conduits.discard(call.id)

    def release(self, call: ZmqCall) -> None:
        self._calls.pop(call.id, None)

    # -- what connections report ---------------------------------------------------------------------------

    def heard(self, peer: Peer, data: bytes) -> None:
        peer.heard_at = self._loop.time()
        peer.reader.feed(data)
        if peer not in self._unread:
            self._read(peer)
        self.turn_soon()

    def broke(self, peer: Peer) -> None:
        if peer not in self._unread:
            self._peers.lose(peer, f"the connection to {peer.url} broke")

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
        """Tells the clients what has come, and the engines what there is to say."""
        self._turn_due = False
        if self._unread:
            unread, self._unread = self._unread, []
            for peer in unread:
                self._read(peer, was_paused=True)
        ready, self._ready = self._ready, []
        for call in ready:
            try:
                call.deliver()
            except Exception as e:  # a bug in one client's sink must not keep the others' bytes back
                self._loop.call_exception_handler({"message": f"{call} could not deliver", "exception": e})
        if self._ready or self._unread:
            self.turn_soon()
        if self._peers.aborting:
            self._peers.say_aborts()
        if self._peers.unsent:
            self._peers.flush()
        self._outbox.flush()
        if self._lends:
            for call in ready:
                call.lend()

    def _read(self, peer: Peer, *, was_paused: bool = False) -> None:
        """A batch of what an engine has sent."""
        reader = peer.reader
        for _ in range(self._batch):
            try:
                message = reader.next()
                if message is None:
                    break
                self._understand(peer, message)
            except WireError as e:
                self.dropped.malformed += 1
                self._on_drop()
                self._complain(peer, e)
            except UpstreamBroken as e:
                self._peers.lose(peer, f"{peer.url}: {e.message}")
                return
        else:
            if not peer.is_lost:
                self._unread.append(peer)
                if not was_paused:
                    peer.pause_reading()
            return
        if reader.replies:
            if not peer.is_full:
                peer.send(reader.replies)
            reader.replies.clear()
        if peer.is_broken:
            self.broke(peer)
        elif was_paused:
            peer.resume_reading()

    def _understand(self, peer: Peer, frame: bytes | memoryview) -> None:
        """One message of an engine. Raises `WireError` for what is none."""
        if peer.conduits and peer.reader.is_drained and self._pass_on(peer, frame):
            return
        try:
            tag, incarnation, deltas = _decode_step(frame)
        except UNDECODABLE:
            self._understand_any(peer, frame)
            return
        if tag == wire.STEP_TAG and incarnation == peer.incarnation:
            self._step(peer, deltas)
        else:
            self._understand_any(peer, frame)

    def _pass_on(self, peer: Peer, frame: bytes | memoryview) -> bool:
        """Lets the answers that flow have their part of a step, if that is one. Not of one with others behind it: of
        those a client gets its parts in one write."""
        assert conduit.compiled is not None
        found = conduit.compiled.step(frame, peer.incarnation, peer.conduits, time.monotonic())
        if found is None:
            return False
        if found:
            others, unsent = found
            for number, data in unsent:
                self._calls[number].unsent(data)
            self._step(peer, others)
        return True

    def _step(self, peer: Peer, deltas: list[tuple[Any, ...]]) -> None:
        """The deltas of one engine step, all well-formed."""
        calls, ready = self._calls, self._ready
        for delta in deltas:
            call = calls.get(delta[0])
            # Unknown: it was aborted, and this was on its way. Another engine's: none of this one's business.
            if call is not None and call.peer is peer and call.hear(delta[1], delta[2], delta[3]):
                ready.append(call)

    def _understand_any(self, peer: Peer, frame: bytes | memoryview) -> None:
        """What `_understand` does, of whatever it may be."""
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
            self._step_of_any(peer, fields[2])
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

    def _step_of_any(self, peer: Peer, deltas: list[object]) -> None:
        """Deltas of whatever shape. One that cannot be read is no reason to drop the others."""
        calls, ready = self._calls, self._ready
        malformed = 0
        for delta in deltas:
            if type(delta) is not list or len(delta) < 4 or type(delta[0]) is not int:
                malformed += 1
                continue
            call = calls.get(delta[0])
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
        head = encoded(peer.opening, number, request)
        if len(head) > wire.MAX_CONTROL_BYTES:
            raise BadRequest(f"the headers of the request are larger than {wire.MAX_CONTROL_BYTES} bytes")
        if len(request.body) > MAX_MESSAGE_BYTES:
            raise BadRequest(f"the body of the request is larger than {MAX_MESSAGE_BYTES} bytes")
        self._peers.ask(peer, head, request.body)
