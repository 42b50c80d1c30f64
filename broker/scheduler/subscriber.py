"""A SUB that engines' PUBs connect to, without libzmq: ZeroMQ's protocol (broker/zmtp.py) on plain sockets.

    bind -> accept -> greeting, READY -> subscription     to each
            look   -> bytes -> messages -> receive        of all that have spoken since the last look

libzmq's I/O thread is woken for every message of every engine, takes the core from a frontend, and wakes us; then each
look at its socket costs as much as understanding a message. Here what a hundred engines said while we rested lies in
the kernel, and is read when the rest is over: one call to learn who spoke, and one for each of them.

Bought: docs/performance.md, section 6.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from broker import zmtp
from broker.errors import UpstreamBroken
from broker.keepalive import keep_alive
from broker.lookout import Lookout
from broker.port import Frames

READ_BYTES: Final = 16 * 1024
"""Of one publisher in one look; some hundred messages."""
MOST: Final = 1023
"""Publishers read in one look."""
ACCEPTED: Final = 64
"""Connections accepted in one look."""
HANDSHAKE_S: Final = 30.0
"""For READY, as in libzmq; who has not said it by then is no publisher."""
BACKLOG: Final = 1024
_READABLE: Final = int(select.EPOLLIN)


class Subscriber:
    """Owns the sockets. On the loop's thread `receive` is called for each message, then `looked` once; a publisher that
    does not speak the protocol is told to `refuse`, and its connection ended."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        topic: bytes,
        receive: Callable[[Frames], None],
        looked: Callable[[], None],
        refuse: Callable[[UpstreamBroken], None],
        *,
        most_parts: int,
        limit: int,
        rest_s: float,
        read_bytes: int = READ_BYTES,
        handshake_s: float = HANDSHAKE_S,
    ) -> None:
        """`most_parts`: frames of a message that are passed on; `limit`: bytes of each. `rest_s`: as of a `Lookout`."""
        self._loop = loop
        self._opening = zmtp.GREETING + zmtp.ready(b"", b"SUB")
        self._subscription = zmtp.subscription(topic)
        self._receive = receive
        self._looked = looked
        self._refuse = refuse
        self._most_parts = most_parts
        self._limit = limit
        self._read_bytes = read_bytes
        self._handshake_s = handshake_s
        self._listeners: dict[int, socket.socket] = {}
        self._publishers: dict[int, _Publisher] = {}
        self._poll = select.epoll()
        self._closed = False
        self._lookout = Lookout(loop, self._poll.fileno(), self.look, rest_s)

    def __repr__(self) -> str:
        return f"<Subscriber publishers={len(self._publishers)}>"

    def bind(self, endpoint: str) -> None:
        """One more endpoint (`broker.addresses.bind`). Raises OSError."""
        listener = _listener(endpoint)
        listener.setblocking(False)
        self._listeners[listener.fileno()] = listener
        self._poll.register(listener.fileno(), _READABLE)

    def look(self) -> None:
        """Hears what has been said since the last time, of each publisher at most so much."""
        if self._closed:
            return
        spoke = self._poll.poll(0, MOST)
        more = len(spoke) == MOST
        for fd, _ in spoke:
            publisher = self._publishers.get(fd)
            if publisher is None:
                more = self._accept(self._listeners[fd]) or more
            elif self._read(publisher):
                more = True
        if more:
            self._loop.call_soon(self.look)
        else:
            self._lookout.rest(bool(spoke))
        if spoke:
            self._looked()

    def close(self) -> None:
        """Idempotent."""
        if not self._closed:
            self._closed = True
            self._lookout.close()
            for publisher in list(self._publishers.values()):
                self._end(publisher)
            for listener in self._listeners.values():
                listener.close()
            self._poll.close()

    def _accept(self, listener: socket.socket) -> bool:
        """True if there may be more who want to connect."""
        for _ in range(ACCEPTED):
            try:
                connection, _ = listener.accept()
            except OSError:  # nobody any more; or there are no more files: at the next look there may be
                return False
            connection.setblocking(False)
            publisher = _Publisher(connection, self._limit)
            self._publishers[publisher.fd] = publisher
            self._poll.register(publisher.fd, _READABLE)
            publisher.deadline = self._loop.call_later(self._handshake_s, self._end, publisher)
            self._say(publisher, self._opening)
        return True

    def _read(self, publisher: _Publisher) -> bool:
        """True if it may have said more than was read."""
        try:
            data = publisher.connection.recv(self._read_bytes)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._end(publisher)
            return False
        reader = publisher.reader
        try:
            reader.feed(data)
            frames = reader.parts(self._most_parts)
            while frames is not None:
                self._hear(frames)
                frames = reader.parts(self._most_parts)
        except UpstreamBroken as e:
            self._end(publisher)
            self._refuse(e)
            return False
        if publisher.deadline is not None and reader.is_open:
            publisher.deadline.cancel()
            publisher.deadline = None
            self._say(publisher, self._subscription)  # not sooner: libzmq would take it for a part of the handshake
        if reader.replies:
            self._say(publisher, b"".join(reader.replies))
            reader.replies.clear()
        return len(data) == self._read_bytes

    def _hear(self, frames: Frames) -> None:
        try:
            self._receive(frames)
        except Exception as e:  # a bug in what one message led to must not keep the others' unread
            self._loop.call_exception_handler({"message": "could not receive a message", "exception": e})

    def _say(self, publisher: _Publisher, data: bytes) -> None:
        """So little is said to a publisher that one which has not room for it does not read at all."""
        try:
            is_said = publisher.connection.send(data) == len(data)
        except OSError:
            is_said = False
        if not is_said:
            self._end(publisher)

    def _end(self, publisher: _Publisher) -> None:
        """Idempotent."""
        if self._publishers.pop(publisher.fd, None) is not None:
            if publisher.deadline is not None:
                publisher.deadline.cancel()
                publisher.deadline = None
            self._poll.unregister(publisher.fd)
            publisher.connection.close()


class _Publisher:
    """One connection."""

    def __init__(self, connection: socket.socket, limit: int) -> None:
        self.connection = connection
        self.fd: Final = connection.fileno()
        self.reader: Final = zmtp.Reader(limit)
        self.deadline: asyncio.TimerHandle | None = None


def _listener(endpoint: str) -> socket.socket:
    if endpoint.startswith("ipc://"):
        path = endpoint.removeprefix("ipc://")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if path.startswith("@"):
                path = "\0" + path[1:]
            else:
                Path(path).unlink(missing_ok=True)  # left by one that was killed
            listener.bind(path)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    if host in ("*", "::"):
        if socket.has_dualstack_ipv6():
            listener = socket.create_server(
                ("", int(port)), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True
            )
        else:
            listener = socket.create_server(("", int(port)), backlog=BACKLOG)
    else:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((str(address[0]), int(port)), family=family, backlog=BACKLOG)
    keep_alive(listener)
    return listener
