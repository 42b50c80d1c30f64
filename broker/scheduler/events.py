"""Load that engines publish: one SUB that native engines connect to, one SUB per SGLang instance that connects to it.
The former, which hears up to fifty messages a second of each, goes without libzmq (subscriber.py).

Every message is `[b"load", 8-byte big-endian sequence, payload]`. A drain may bring many messages of one instance;
of those only the newest matters, and it is applied once, after the drain. While engines have something to say all the
time, they are listened to every `REST_S`; what is said after a silence is heard at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec
import zmq

from broker import wire
from broker.engines import native, sglang
from broker.errors import UpstreamBroken, WireError
from broker.port import Frames, Port
from broker.scheduler.subscriber import Subscriber
from broker.scheduler.tally import Tally
from broker.table import SchedulerEvent
from broker.types import LoadReport, Trust

logger = logging.getLogger("scheduler")

COMMON = "of the common socket"
PARTS = 3
SUBSCRIBER_HWM = 4096
REST_S = 0.1
"""A few steps of most engines. They may speak more often (docs/wire.md, 6), but each wake-up costs the same for many
reports as for one, and is paid by the core that frontends run on. Decisions do not wait for them, they add what is in
flight now."""
MOST_PUBLISHERS = 8192
"""Whose last sequence is remembered; the longest silent is forgotten first."""
MOST_MISSED = 1 << 32
"""A jump this far is a publisher that counts anew, not a loss; and the count of losses stays within its cell."""

Source = str | bytes
"""Who a report is of: the URL of an instance that was connected to, the incarnation of a native engine."""

_payload = msgspec.msgpack.Decoder(wire.Load | sglang.LoadStat)


class Inbox:
    """The newest report per source, and what the sequences tell of lost ones. Pure."""

    def __init__(self) -> None:
        self._last: dict[tuple[Source, int], int] = {}
        self._ranks: dict[Source, dict[int, sglang.LoadStat]] = {}
        self._newest: dict[Source, LoadReport] = {}
        self.missed = 0
        """Messages that were sent and never came."""

    def hear(self, frames: Frames, url: str | None) -> None:
        """One message; `url` = whose publisher it was read from, None = from the common socket.

        Raises WireError on anything else than a load message.
        """
        if len(frames) != PARTS or frames[0] != wire.LOAD_TOPIC or len(frames[1]) != 8:
            raise WireError("not a load message: its frames are the topic, 8 bytes of sequence, the load")
        load = wire.decode(_payload, frames[2])
        sequence = int.from_bytes(frames[1], "big")
        if isinstance(load, wire.Load):
            if len(load.incarnation) != wire.INCARNATION_BYTES:
                raise WireError("a load message without a valid incarnation")
            gap = self._gap((load.incarnation, 0), sequence)
            self._keep(load.incarnation, native.load_report(load), gap)
        elif url is None:
            raise WireError("SGLang's LoadStat names no instance: it is read where its `load_endpoint` says")
        else:
            gap = self._gap((url, load.rank), sequence)
            ranks = self._ranks.setdefault(url, {})
            if load.rank in ranks or len(ranks) < sglang.MOST_RANKS:
                ranks[load.rank] = load
            self._keep(url, sglang.load_report(ranks.values()), gap)

    def take(self) -> dict[Source, LoadReport]:
        """The newest report of each source since the last call."""
        newest, self._newest = self._newest, {}
        return newest

    def forget(self, url: str) -> None:
        """An instance is no longer followed."""
        for rank in self._ranks.pop(url, {}):
            self._last.pop((url, rank), None)
        self._newest.pop(url, None)

    def _keep(self, source: Source, report: LoadReport, gap: int) -> None:
        if gap:
            self.missed += gap
            report = msgspec.structs.replace(report, trust=Trust.APPROX)
        self._newest[source] = report

    def _gap(self, publisher: tuple[Source, int], sequence: int) -> int:
        """How many messages are missing before this one. A number not above the last, or far beyond it, is a
        restarted publisher."""
        last = self._last.pop(publisher, None)
        self._last[publisher] = sequence  # popped and stored again: the order of the dict is that of last use
        if last is None:
            if len(self._last) > MOST_PUBLISHERS:
                del self._last[next(iter(self._last))]
            return 0
        gap = sequence - last - 1
        return gap if 0 <= gap < MOST_MISSED else 0


class LoadFeed:
    """The SUB sockets. `apply` gets the newest reports after each drain."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        context: zmq.Context[Any],
        tally: Tally,
        apply: Callable[[dict[Source, LoadReport]], None],
    ) -> None:
        self._loop = loop
        self._context = context
        self._tally = tally
        self._apply = apply
        self._inbox = Inbox()
        self._pending = False
        self._common = Subscriber(
            loop,
            wire.LOAD_TOPIC,
            self._hear_common,
            self._deliver,
            self._refuse,
            most_parts=PARTS + 1,
            limit=wire.MAX_CONTROL_BYTES,
            rest_s=REST_S,
        )
        self._followed: dict[str, tuple[str, Port]] = {}  # url -> (endpoints, its socket)

    def bind(self, endpoints: Iterable[str]) -> None:
        """Opens the common socket. Raises OSError."""
        for endpoint in endpoints:
            self._common.bind(endpoint)

    def follow(self, wanted: dict[str, str]) -> None:
        """Connects to exactly these: url -> comma-separated endpoints. Cheap when nothing changed."""
        for url in [u for u, (endpoints, _) in self._followed.items() if wanted.get(u) != endpoints]:
            self._followed.pop(url)[1].close()
            self._inbox.forget(url)
        for url, endpoints in wanted.items():
            if url not in self._followed:
                try:
                    socket = self._subscriber()
                    port = Port(self._loop, socket, partial(self._hear, url=url), rest_s=REST_S)
                    self._followed[url] = endpoints, port
                    for endpoint in endpoints.split(","):
                        socket.connect(endpoint)
                except zmq.ZMQError as e:
                    logger.warning("%s: cannot follow its load at %s: %s", url, endpoints, e)

    def close(self) -> None:
        self.follow({})
        self._common.close()

    def _subscriber(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, SUBSCRIBER_HWM)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_CONTROL_BYTES)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.SUBSCRIBE, wire.LOAD_TOPIC)
        return socket

    def _hear_common(self, frames: Frames) -> None:
        try:
            self._inbox.hear(frames, None)
        except WireError as e:
            self._tally.dropped("load", COMMON, e)

    def _refuse(self, error: UpstreamBroken) -> None:
        self._tally.dropped("load", COMMON, error)

    def _hear(self, frames: Frames, url: str) -> None:
        try:
            self._inbox.hear(frames, url)
        except WireError as e:
            self._tally.dropped("load", url, e)
            return
        if not self._pending:
            self._pending = True
            self._loop.call_soon(self._deliver)  # behind the drain that is going on

    def _deliver(self) -> None:
        self._pending = False
        if self._inbox.missed:
            self._tally.add(SchedulerEvent.LOADS_MISSED, self._inbox.missed)
            self._inbox.missed = 0
        newest = self._inbox.take()
        if newest:
            self._apply(newest)
