"""The connections of the one ROUTER socket: each to one life of one engine.

A connection is a life: it is made once, under routing ids of its own, and never silently made again, because
what was sent or on its way when it broke is lost, and a request lost without a word would wait for ever. libzmq's
own reconnecting is put off for weeks; a `Monitor` tells when a connection broke, silence when it only seems to live.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
from dataclasses import dataclass, field
from typing import Protocol

import zmq

from broker import wire
from broker.errors import ConnectFailed, EngineSaturated, PenstockError, UpstreamBroken
from broker.types import Instance
from frontend.upstream.zmq_monitor import Monitor

MARK = 4096
"""Messages queued to or from one engine. At the mark a request is refused (EAGAIN), never dropped."""
MAX_MESSAGE_BYTES = 128 * 1024 * 1024
AGAIN_S = 0.01
"""When an engine at its mark is told of its aborts again. Not in the next turn: that would loop without pause."""

# Plain ints: pyzmq's enums cost several per cent of a request in flag arithmetic.
_NOBLOCK = int(zmq.NOBLOCK)
_NOBLOCK_MORE = _NOBLOCK | int(zmq.SNDMORE)

_send = zmq.backend.Socket.send
"""What `zmq.Socket.send` calls when it has looked at its options: half the price."""


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


class Owner(Protocol):
    """What the connections ask of the transport."""

    def turn_soon(self) -> None:
        """The socket was used, which may have used up its FD's signal: look at it again."""

    def lost(self, peer: Peer, error: PenstockError) -> None:
        """Nothing more is heard of this peer. Whoever is calling may be one of its calls."""

    def is_used(self, peer: Peer) -> bool:
        """Whether a call is open there."""


class Peers:
    """Owns the socket, its monitor and every connection. Used on the loop's thread alone."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        owner: Owner,
        connect_s: float,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.socket = _router(context)
        self.epoch = 0
        """The scheduler's, as told in DataHello."""
        self.by_route: dict[bytes, Peer] = {}
        self.aborting: set[Peer] = set()
        """Those with `aborts`."""
        self._by_url: dict[str, Peer] = {}
        """One life at a time is believed to be at an endpoint."""
        self._owner = owner
        self._connect_s = connect_s
        self._loop = loop
        self._lives = 0
        self._broken: list[Peer] = []
        self._monitor = Monitor(self.socket, loop, self._broke)
        self._last_beat = loop.time()
        self._beat_timer = loop.call_later(wire.BEAT_S, self._beat)
        self._again_timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._by_url)

    def close(self) -> None:
        self._beat_timer.cancel()
        if self._again_timer is not None:
            self._again_timer.cancel()
        self._monitor.close()
        self.socket.close(linger=0)
        self._by_url.clear()
        self.by_route.clear()
        self.aborting.clear()

    # -- making and ending -------------------------------------------------------------------------------------

    def at(self, instance: Instance) -> Peer:
        """The connection to this life of the engine, made and greeted if there is none yet. Raises `ConnectFailed`."""
        peer = self._by_url.get(instance.url)
        if peer is not None:
            if peer.incarnation == instance.incarnation:
                peer.retired = False
                return peer
            self.lose(peer, f"another life of the engine is at {peer.url}")
        if len(instance.incarnation) != wire.INCARNATION_BYTES:
            raise ConnectFailed(f"{instance.url} is registered without an incarnation")
        self._lives += 1
        # The number makes it a name that this socket never had: libzmq ends the process when a routing id is
        # given twice, and that of a connection just ended lives on until its I/O thread has taken leave.
        route = instance.incarnation + self._lives.to_bytes(4, "big")
        socket = self.socket
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
        self._by_url[instance.url] = peer
        self.by_route[route] = peer
        self.say(peer, wire.DataHello(wire.PROTOCOL, self.epoch))
        return peer

    def lose(self, peer: Peer, why: str) -> None:
        """Ends a connection. Idempotent."""
        if self.by_route.pop(peer.routing_id, None) is None:
            return
        del self._by_url[peer.url]
        self.aborting.discard(peer)
        self._monitor.forget(peer.endpoint)
        try:
            self.socket.disconnect(peer.url)
        except zmq.ZMQError as e:
            if e.errno != errno.ENOENT:  # libzmq has ended it already: the handshake failed
                raise
        broken = "the connection to the engine broke"
        self._owner.lost(peer, UpstreamBroken(why, public=broken) if peer.welcomed else ConnectFailed(why))

    def lose_broken(self) -> None:
        """Ends those that the monitor has told of; to be called when all that they had sent has been read."""
        if self._broken:
            broken, self._broken = self._broken, []
            for peer in broken:
                self.lose(peer, f"the connection to {peer.url} broke")

    def retire(self, incarnation: bytes) -> None:
        """That life of an engine was removed: answers under way go on, then its connection is ended."""
        for peer in [p for p in self._by_url.values() if p.incarnation == incarnation]:
            peer.retired = True
            self._end_if_idle(peer)

    def resync(self, epoch: int) -> None:
        """A new scheduler: every engine is told, so that it registers there."""
        self.epoch = epoch
        for peer in list(self._by_url.values()):
            self.say(peer, wire.DataHello(wire.PROTOCOL, epoch))

    def _end_if_idle(self, peer: Peer) -> None:
        if not self._owner.is_used(peer):
            self.lose(peer, f"{peer.url} was removed")

    def _broke(self, endpoint: str) -> None:
        self._broken += [p for p in self._by_url.values() if p.endpoint == endpoint]
        self._owner.turn_soon()

    def _beat(self) -> None:
        now = self._loop.time()
        self._beat_timer = self._loop.call_later(wire.BEAT_S, self._beat)
        slept = now - self._last_beat - wire.BEAT_S
        self._last_beat = now
        if slept > wire.BEAT_S:
            # We were stopped or starved; what the engines said meanwhile is still unread, and they are not to blame.
            for peer in self._by_url.values():
                peer.heard_at += slept
                peer.connected_at += slept
        for peer in list(self._by_url.values()):
            if not peer.welcomed and now - peer.connected_at > self._connect_s:
                self.lose(peer, f"{peer.url} did not answer within {self._connect_s:g} s")
            elif peer.welcomed and now - peer.heard_at > wire.DEAD_AFTER_S:
                self.lose(peer, f"{peer.url} was silent for {wire.DEAD_AFTER_S:g} s")
            else:
                self.say(peer, wire.Ping())
                if peer.retired:
                    self._end_if_idle(peer)

    # -- saying ------------------------------------------------------------------------------------------------

    def ask(self, peer: Peer, head: bytes, body: bytes) -> None:
        """A request. Raises, and then nothing was sent."""
        socket = self.socket
        try:
            _send(socket, peer.routing_id, _NOBLOCK_MORE)  # fails here or not at all: a message is taken whole
        except zmq.Again as e:
            raise EngineSaturated(f"{peer.url} takes no more messages now") from e
        except zmq.ZMQError as e:
            self.lose(peer, f"the connection to {peer.url} broke")
            raise ConnectFailed(f"{peer.url} cannot be reached: {e}") from e
        _send(socket, head, _NOBLOCK_MORE)
        _send(socket, body, _NOBLOCK, False)  # copied all the same below pyzmq's threshold

    def say(self, peer: Peer, message: wire.FrontendToEngine) -> None:
        """A message that may be lost at a mark, because it is said again or silence says the same."""
        try:
            self.socket.send(peer.routing_id, _NOBLOCK_MORE)
            self.socket.send(wire.encode(message), _NOBLOCK)
        except zmq.Again:
            pass
        except zmq.ZMQError:
            self.lose(peer, f"the connection to {peer.url} broke")
        self._owner.turn_soon()

    def say_aborts(self) -> None:
        """One message for each engine; one that takes none now is asked again soon."""
        for peer in list(self.aborting):
            try:
                self.socket.send(peer.routing_id, _NOBLOCK_MORE)
            except zmq.Again:
                continue
            except zmq.ZMQError:
                self.lose(peer, f"the connection to {peer.url} broke")
                continue
            self.socket.send(wire.encode(wire.Abort(peer.aborts)), _NOBLOCK)
            peer.aborts = []
            self.aborting.discard(peer)
            self._owner.turn_soon()
        if self.aborting and self._again_timer is None:
            # A send that failed may have used up the signal, too: of the engine's having room, or of a message to read.
            self._again_timer = self._loop.call_later(AGAIN_S, self._again)

    def _again(self) -> None:
        self._again_timer = None
        self._owner.turn_soon()


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
