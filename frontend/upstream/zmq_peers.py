"""The connections to native engines: each to one life of one engine.

A connection is a life: it is made once, under a name of its own, and never silently made again, because what was sent
or on its way when it broke is lost, and a request lost without a word would wait for ever.

They are sockets of the event loop that speak ZeroMQ's own protocol (broker/zmtp.py). libzmq's I/O thread is woken for
every message that finds it at rest, and takes the core from us; every look at its socket is a system call or two: a
third of an unstreamed request. Here the requests of one turn are one write, and what an engine has said meanwhile is
one read.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Final, Protocol, cast

from broker import wire, zmtp
from broker.errors import ConnectFailed, EngineSaturated, PenstockError, UpstreamBroken
from broker.types import Instance
from frontend import conduit
from frontend.upstream.zmq_address import Address
from frontend.upstream.zmq_request import opening

if TYPE_CHECKING:
    from frontend._conduit import Conduits

JOIN_BYTES: Final = 64 * 1024
"""What a turn has to say is copied into one piece up to this size; above, that costs more than it saves."""
MARK_BYTES: Final = 16 * 1024 * 1024
"""Queued to one engine that does not read. Beyond it a request is refused, never dropped."""


class Peer:
    """One connection to one life of an engine. What is sent waits for the end of the turn, and until it is open."""

    def __init__(self, url: str, incarnation: bytes, now: float, owner: Owner, peers: Peers) -> None:
        self.url = url
        self.incarnation = incarnation
        self.opening = opening(incarnation)
        self.connected_at = self.heard_at = now
        self.reader = zmtp.Reader()
        self.welcomed = False
        self.retired = False
        """Removed; kept for the calls still open there."""
        self.complained = False
        """One of its frames was dropped, and the log has said so."""
        self.is_broken = False
        """Nothing more comes; what has come may still be unread."""
        self.is_lost = False
        self.conduits: Conduits | None = None if conduit.compiled is None else conduit.compiled.Conduits()
        """The answers that flow, by the numbers of their requests."""
        self.aborts: list[int] = []
        """Requests it need not go on with; told together at the end of the turn."""
        self._owner = owner
        self._peers = peers
        self._transport: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._is_stuck = False

    @property
    def is_full(self) -> bool:
        """It takes no more now."""
        return self._is_stuck or self._unsent_bytes > MARK_BYTES

    def connect(self, address: Address, loop: asyncio.AbstractEventLoop) -> None:
        self._connecting = loop.create_task(self._connect(address, loop))

    async def _connect(self, address: Address, loop: asyncio.AbstractEventLoop) -> None:
        try:
            await address.connect(loop, self._protocol)
        except (OSError, ValueError) as e:  # ValueError: a name that cannot be one
            self._peers.lose(self, f"cannot connect to {self.url}: {e}")

    def _protocol(self) -> asyncio.Protocol:
        return cast("asyncio.Protocol", self)  # as loops see it; a plain class can be compiled

    def send(self, pieces: list[bytes]) -> None:
        """Frames, each behind its `zmtp.head`."""
        if not self._unsent:
            self._peers.unsent.append(self)
        for piece in pieces:
            self._unsent.append(piece)
            self._unsent_bytes += len(piece)

    def flush(self) -> bool:
        """Writes what was sent; False: not yet."""
        transport = self._transport
        if self.is_lost:
            return True
        if transport is None or not self.reader.is_open:
            return False
        if transport.is_closing():
            pass  # `connection_lost` follows
        elif self._unsent_bytes <= JOIN_BYTES:
            transport.write(b"".join(self._unsent))
        else:
            transport.writelines(self._unsent)
        self._unsent, self._unsent_bytes = [], 0
        return True

    def pause_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def end(self) -> None:
        """Whatever is on its way is lost."""
        self.is_lost = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._transport is not None:
            self._transport.abort()

    # -- the transport's callbacks -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)  # uvloop's are no subclass
        if self.is_lost:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=MARK_BYTES)
        # Our name is new: an engine need not know that an old connection is dead to take this one.
        transport.write(zmtp.GREETING + zmtp.ready(b"F" + secrets.token_bytes(15)))

    def data_received(self, data: bytes) -> None:
        self._owner.heard(self, data)

    def eof_received(self) -> None:
        """Half a connection is of no use: `connection_lost` follows."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_broken = True
        self._owner.broke(self)

    def pause_writing(self) -> None:
        self._is_stuck = True

    def resume_writing(self) -> None:
        self._is_stuck = False
        self._owner.turn_soon()  # there may be aborts to say


class Owner(Protocol):
    """What the connections ask of the transport."""

    def turn_soon(self) -> None:
        """Says in a later turn of the loop what there is to say."""

    def heard(self, peer: Peer, data: bytes) -> None:
        """Bytes have come."""

    def broke(self, peer: Peer) -> None:
        """Nothing more will come. It is to be lost as soon as all that came has been read."""

    def lost(self, peer: Peer, error: PenstockError) -> None:
        """Nothing more is heard of this peer. Whoever is calling may be one of its calls."""

    def is_used(self, peer: Peer) -> bool:
        """Whether a call is open there."""


class Peers:
    """Owns every connection. Used on the loop's thread alone."""

    def __init__(self, owner: Owner, connect_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self.epoch = 0
        """The scheduler's, as told in DataHello."""
        self.aborting: set[Peer] = set()
        """Those with `aborts`."""
        self.unsent: list[Peer] = []
        """Those with something to write."""
        self._by_url: dict[str, Peer] = {}
        """One life at a time is believed to be at an endpoint."""
        self._owner = owner
        self._connect_s = connect_s
        self._loop = loop
        self._last_beat = loop.time()
        self._beat_timer = loop.call_later(wire.BEAT_S, self._beat)

    def __len__(self) -> int:
        return len(self._by_url)

    def close(self) -> None:
        self._beat_timer.cancel()
        for peer in self._by_url.values():
            peer.end()
        self._by_url.clear()
        self.aborting.clear()
        self.unsent.clear()

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
        address = Address(instance.url)
        peer = Peer(instance.url, instance.incarnation, self._loop.time(), self._owner, self)
        self._by_url[instance.url] = peer
        self.say(peer, wire.DataHello(wire.PROTOCOL, self.epoch))
        peer.connect(address, self._loop)
        return peer

    def lose(self, peer: Peer, why: str) -> None:
        """Ends a connection. Idempotent."""
        if peer.is_lost:
            return
        peer.end()
        del self._by_url[peer.url]
        self.aborting.discard(peer)
        broken = "the connection to the engine broke"
        self._owner.lost(peer, UpstreamBroken(why, public=broken) if peer.welcomed else ConnectFailed(why))

    def retire(self, incarnation: bytes) -> None:
        """That life of an engine was removed: answers under way go on, then its connection is ended."""
        for peer in [p for p in self._by_url.values() if p.incarnation == incarnation]:
            peer.retired = True
            self._end_if_idle(peer)

    def resync(self, epoch: int) -> None:
        """A new scheduler: every engine is told, so that it registers there."""
        self.epoch = epoch
        for peer in self._by_url.values():
            self.say(peer, wire.DataHello(wire.PROTOCOL, epoch))

    def _end_if_idle(self, peer: Peer) -> None:
        if not self._owner.is_used(peer):
            self.lose(peer, f"{peer.url} was removed")

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
        """A request; it goes out at the end of the turn. Raises, and then nothing is sent."""
        if peer.is_full:
            raise EngineSaturated(f"{peer.url} takes no more messages now")
        peer.send([zmtp.head(len(head), more=True), head, zmtp.head(len(body)), body])

    def say(self, peer: Peer, message: wire.FrontendToEngine) -> None:
        """A message that an engine which takes no more does not get: it is said again, or silence says the same."""
        if not peer.is_full:
            peer.send(_framed(message))
            self._owner.turn_soon()

    def say_aborts(self) -> None:
        """One message for each engine; one that takes none now is told when it does."""
        for peer in [p for p in self.aborting if not p.is_full]:
            peer.send(_framed(wire.Abort(peer.aborts)))
            peer.aborts = []
            self.aborting.discard(peer)

    def flush(self) -> None:
        """Writes what was sent in this turn, to each engine in one piece."""
        unsent, self.unsent = self.unsent, []
        self.unsent += [peer for peer in unsent if not peer.flush()]


def _framed(message: wire.FrontendToEngine) -> list[bytes]:
    frame = wire.encode(message)
    return [zmtp.head(len(frame)), frame]
