"""ZMTP 3, the protocol of ZeroMQ on the wire, as far as it is spoken here without libzmq. Pure: bytes in, messages out.

    <---> greeting                          64 bytes, each side at once
    <---> READY: kind of socket, identity   the mechanism is NULL
    ----> subscription                      by a SUB
    <---> message, message, ...             one or more frames each; a PING among them is answered by a PONG

    frame:  flags (MORE = 1, LONG = 2, COMMAND = 4) | size: 1 byte, or 8 if LONG | bytes

https://rfc.zeromq.org/spec/23 and 37. Why this and not libzmq: frontend/upstream/zmq_peers.py,
broker/scheduler/subscriber.py.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from broker.errors import UpstreamBroken, WireError

MAX_MESSAGE_BYTES: Final = 128 * 1024 * 1024
COPIED_BYTES: Final = 1024
"""Up to so many it costs less to copy a message than to make a view of it."""

_MORE: Final = 1
_LONG: Final = 2
_COMMAND: Final = 4
_BYTES: Final = [bytes((value,)) for value in range(256)]
_LONG_HEAD: Final = Struct(">BQ")
_LONG_HEADS: Final = [_LONG_HEAD.pack(_LONG | more, 0)[:-2] for more in (False, True)]
"""But for the size's last two bytes."""
_GREETING_BYTES: Final = 64
_SIGNATURE: Final = b"\xff\0\0\0\0\0\0\0\0\x7f"
_NULL: Final = b"NULL".ljust(20, b"\0")
GREETING: Final = _SIGNATURE + b"\3\1" + _NULL + bytes(32)
"""Version 3.1, and: we are no server of the mechanism."""


def ready(identity: bytes, kind: bytes = b"DEALER") -> bytes:
    """What follows the greeting; `identity` is what a ROUTER will call us."""
    properties = ((b"Socket-Type", kind), (b"Identity", identity))
    body = b"".join([bytes((len(k),)) + k + len(v).to_bytes(4, "big") + v for k, v in properties])
    return _command(b"READY", body)


def subscription(topic: bytes) -> bytes:
    """A SUB's first message: what begins with `topic` is wanted."""
    return head(1 + len(topic)) + b"\1" + topic


def head(size: int, *, more: bool = False) -> bytes:
    """What stands before the bytes of a frame; `more`: it is not the last one of its message."""
    if size < 256:
        return _BYTES[more] + _BYTES[size]
    if size < 65536:  # nearly every request, of which each takes two: a fourth of what `pack` does
        return _LONG_HEADS[more] + _BYTES[size >> 8] + _BYTES[size & 255]
    return _LONG_HEAD.pack(_LONG | more, size)


class Reader:
    """What the other side says. `feed`, then `next` or `parts` until it has no more; all of them raise `UpstreamBroken`
    when there is nothing to be hoped for from this connection."""

    __slots__ = (
        "_at",
        "_begin",
        "_data",
        "_held",
        "_is_first",
        "_limit",
        "_missing",
        "_more",
        "_parts",
        "_state",
        "replies",
    )

    def __init__(self, limit: int = MAX_MESSAGE_BYTES) -> None:
        """`limit`: bytes of a frame."""
        self.replies: list[bytes] = []
        """To be sent by whoever owns the connection, who clears them."""
        self._limit = limit
        self._state = 0  # what is awaited: 0 greeting, 1 READY, 2 messages
        self._more = False  # of the last frame
        self._is_first = True  # the next frame, of its message
        self._parts: list[bytes] = []  # of a message whose last frame has not come
        self._data = b""
        self._begin = 0  # of the last frame
        self._at = 0  # its end
        self._held: list[bytes] = []  # the pieces of what is not whole yet: joined once, however large it is
        self._missing = 0

    @property
    def is_open(self) -> bool:
        """The other side has said READY."""
        return self._state == 2

    @property
    def is_drained(self) -> bool:
        """All that was fed has been asked for, and was whole."""
        return not self._held and self._at == len(self._data)

    def feed(self, data: bytes) -> None:
        """More bytes."""
        if self._held:
            self._held.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = b"".join(self._held)
            self._held = []
        elif self._at < len(self._data):  # not all was asked for
            data = self._data[self._at :] + data
        self._data, self._at = data, 0

    def next(self) -> bytes | memoryview | None:
        """The next message, or a view of a long one; None: the rest of it has not come. Raises `WireError` for one of
        several frames, which is passed over."""
        while True:
            if not self._frame():
                return None
            if self._more:
                self._is_first = False
            elif self._is_first:
                # The deltas of a hundred streams would be copied, to be taken apart and forgotten.
                long = self._at - self._begin > COPIED_BYTES
                return memoryview(self._data)[self._begin : self._at] if long else self._data[self._begin : self._at]
            else:
                self._is_first = True
                raise WireError("more than one frame")

    def parts(self, most: int) -> list[bytes] | None:
        """The frames of the next message, the first `most` of them; None: the rest of it has not come."""
        while True:
            if not self._frame():
                return None
            if len(self._parts) < most:
                self._parts.append(self._data[self._begin : self._at])
            if not self._more:
                parts, self._parts = self._parts, []
                return parts

    def _frame(self) -> bool:
        """Goes on to the next one: where it begins and ends, and whether there are more of its message. False: the rest
        of it has not come."""
        if self._state == 0 and not self._greeted():
            return False
        while True:
            data, at = self._data, self._at
            left = len(data) - at
            if left < 2:
                self._hold(2 - left)
                return False
            flags = data[at]
            if flags & _LONG:
                if left < 9:
                    self._hold(9 - left)
                    return False
                at += 9
                size = data[at - 4] << 24 | data[at - 3] << 16 | data[at - 2] << 8 | data[at - 1]
                if size > self._limit or data[at - 8] | data[at - 7] | data[at - 6] | data[at - 5]:
                    size = int.from_bytes(data[at - 8 : at], "big")
                    raise UpstreamBroken(f"the engine sent a frame of {size} bytes, the limit is {self._limit}")
            else:
                at += 2
                size = data[at - 1]
            end = at + size
            if end > len(data):
                self._hold(end - len(data))
                return False
            self._begin, self._at = at, end
            if flags & _COMMAND:
                self._obey(data[at:end])
            elif self._state != 2:
                raise UpstreamBroken("the engine's greeting is none of ZMTP: a message came before READY")
            else:
                self._more = flags & _MORE != 0
                return True

    def _hold(self, missing: int) -> None:
        """Keeps what is left until so much more has come."""
        if self._at < len(self._data):
            self._held = [self._data[self._at :]]
            self._missing = missing
        self._data, self._at = b"", 0

    def _greeted(self) -> bool:
        greeting = self._data[:_GREETING_BYTES]
        if greeting[:1] not in (b"", b"\xff") or (len(greeting) > 9 and not greeting[9] & 1):
            raise UpstreamBroken("the engine does not speak ZMTP")
        if len(greeting) > 10 and greeting[10] < 3:
            raise UpstreamBroken(f"the engine speaks ZMTP {greeting[10]}, not 3")
        if len(greeting) < _GREETING_BYTES:
            self._hold(_GREETING_BYTES - len(greeting))
            return False
        if greeting[12:32] != _NULL:
            raise UpstreamBroken("the engine demands a security mechanism")
        self._state = 1
        self._at = _GREETING_BYTES
        return True

    def _obey(self, command: bytes) -> None:
        name, rest = command[1 : 1 + command[0]] if command else b"", command[1 + command[0] :] if command else b""
        if name == b"READY":
            self._state = 2
        elif name == b"ERROR":
            raise UpstreamBroken(f"the engine refuses the connection: {rest[1:].decode('utf-8', 'replace')}")
        elif name == b"PING":
            self.replies.append(_command(b"PONG", rest[2:18]))  # behind the time to live, in tenths of a second


def _command(name: bytes, body: bytes) -> bytes:
    whole = bytes((len(name),)) + name + body
    return bytes((_COMMAND, len(whole))) + whole
