"""A ZMQ socket on the event loop, without a task or a future per message.

The socket's file descriptor signals edges, not levels: it falls silent after one wake-up until `EVENTS` has been
looked at, and any send may swallow an edge. So `EVENTS` is read after every send and after a drain that stopped early;
without that a message that arrived during a send would lie unread until the next one came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

DRAIN = 256
"""Messages handled before other callbacks of the loop get their turn."""

Frames = list[bytes]


class Port:
    """Owns the socket. `receive` is called for each message, on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes], receive: Callable[[Frames], None]):
        self._loop = loop
        self._socket = socket
        self._receive = receive
        self._fd = socket.fileno()
        self._woken = False
        self._closed = False
        loop.add_reader(self._fd, self.drain)
        self._wake()

    def send(self, frames: Frames) -> None:
        """Never blocks. Raises `zmq.Again` at the mark, `zmq.ZMQError` EHOSTUNREACH for an unknown peer."""
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=True)
        finally:
            if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                self._wake()

    def drain(self) -> None:
        """Handles what is readable, at most `DRAIN` messages. If the receiver raises, the others are not left lying."""
        self._woken = False
        more = True
        try:
            for _ in range(DRAIN):
                if self._closed:
                    return
                try:
                    frames = self._socket.recv_multipart(zmq.DONTWAIT)
                except zmq.Again:
                    more = False
                    return
                self._receive(frames)
        finally:
            if more:
                self._wake()

    def close(self, linger_ms: int = 0) -> None:
        """Idempotent. `linger_ms`: how long unsent messages may still leave in the background."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=linger_ms)

    def _wake(self) -> None:
        if not self._woken and not self._closed:
            self._woken = True
            self._loop.call_soon(self.drain)
