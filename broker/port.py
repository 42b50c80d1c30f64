"""A ZMQ socket on the event loop, without a task or a future per message.

The socket's file descriptor signals edges, not levels: it falls silent after one wake-up until `EVENTS` has been
looked at, and any send may swallow an edge. So `EVENTS` is read after every send and after a drain that stopped early;
without that a message that arrived during a send would lie unread until the next one came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import zmq

from broker.lookout import Lookout

DRAIN = 256
"""Messages handled before other callbacks of the loop get their turn."""

Frames = list[bytes]

_DONTWAIT: Final = int(zmq.DONTWAIT)
_POLLIN: Final = int(zmq.POLLIN)
_EVENTS: Final = zmq.SocketOption.EVENTS


class Port:
    """Owns the socket. `receive` is called for each message, on the loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[bytes],
        receive: Callable[[Frames], None],
        *,
        rest_s: float = 0.0,
    ):
        """`rest_s`: as of a `Lookout`."""
        self._loop = loop
        self._socket = socket
        self._receive = receive
        self._woken = False
        self._closed = False
        self._lookout = Lookout(loop, socket.fileno(), self.drain, rest_s)
        self._wake()

    def send(self, frames: Frames) -> None:
        """Never blocks. Raises `zmq.Again` at the mark, `zmq.ZMQError` EHOSTUNREACH for an unknown peer."""
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT, copy=True)
        finally:
            if self._is_readable():
                self._wake()

    def drain(self) -> None:
        """Handles what is readable, at most `DRAIN` messages. If the receiver raises, the others are not left lying."""
        self._woken = False
        more = True
        heard = False
        try:
            for _ in range(DRAIN):
                if self._closed:
                    return
                if not self._is_readable():
                    more = False
                    return
                heard = True
                self._receive(self._next())
        finally:
            if more:
                self._wake()
            else:
                self._lookout.rest(heard)

    def close(self, linger_ms: int = 0) -> None:
        """Idempotent. `linger_ms`: how long unsent messages may still leave in the background."""
        if not self._closed:
            self._closed = True
            self._lookout.close()
            self._socket.close(linger=linger_ms)

    def _is_readable(self) -> bool:
        """Asked for, not tried: an `Again` is made by more Python than all of a drain."""
        return bool(int(self._socket.getsockopt(_EVENTS)) & _POLLIN)

    def _next(self) -> Frames:
        """The next message, of which there is one."""
        frame = self._socket.recv(_DONTWAIT, copy=False)
        frames = [frame.bytes]
        while frame.more:
            frame = self._socket.recv(_DONTWAIT, copy=False)
            frames.append(frame.bytes)
        return frames

    def _wake(self) -> None:
        if not self._woken and not self._closed:
            self._woken = True
            self._loop.call_soon(self.drain)
