"""What tests of the short way (frontend/conduit.py) share: a client's connection, and what a conduit notes."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from frontend import conduit
from frontend.forward import _events
from frontend.upstream.http_chunk import chunk_size

if TYPE_CHECKING:
    from frontend._conduit import Conduit

NOW = 12.5
EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":42}}\n\n'
Noted = tuple[int, int, bytes, bytes, bytes, float]
"""Of a conduit: size, events, ending, last, tail, touched."""


def framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Ends:
    """A client's connection: the end that a conduit writes to, and the one that the client reads."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.ours, self.theirs = (stack.enter_context(end) for end in socket.socketpair())
        self.theirs.setblocking(False)
        assert conduit.compiled is not None
        self.conduit: Conduit = conduit.compiled.Conduit(self.ours.fileno())

    def read(self) -> bytes:
        """All that there is."""
        heard = bytearray()
        with contextlib.suppress(BlockingIOError):
            while part := self.theirs.recv(1 << 20):
                heard += part
        return bytes(heard)

    def stick(self) -> None:
        """The client has left so much unread that its socket takes nothing more."""
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.ours.send(bytes(1 << 16))

    @property
    def noted(self) -> Noted:
        it = self.conduit
        return it.size, it.events, it.ending, it.last, it.tail, it.touched


def whole_chunks(data: bytes) -> list[bytes] | None:
    """What is in the chunks that the data is; None: it is something else."""
    found = []
    while data:
        end = next((end for end in range(1, len(data) + 1) if chunk_size(data[:end])), 0)
        if not end:
            return None
        found.append(data[end - 2 - chunk_size(data[:end]) : end - 2])
        data = data[end:]
    return found


def noted_of(sent: list[bytes], bodies: list[bytes]) -> Noted:
    """What a conduit has noted after it has sent these, with these bodies in them."""
    body = b"".join(bodies)
    last, tail = (_usage(data) for data in [*sent[::-1], b"", b""][:2])
    events = sum(_events(data, 0, len(data)) for data in bodies)
    return len(body), events, body[-4:], last, b"" if last else tail, NOW if sent else 0.0


def _usage(data: bytes) -> bytes:
    """What there is to keep of what was sent."""
    end = data[-2048:]
    return end if b'"completion_tokens"' in end else b""


@st.composite
def mutated(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """With one byte changed, taken out or put in, perhaps."""
    data = draw(whole)
    at = draw(st.integers(0, max(0, len(data) - 1)))
    new = draw(st.none() | st.just(b"") | st.sampled_from([b"\r", b"\n", b"0", b"a", b"\0", b"\xff"]))
    if new is None or not data:
        return data
    return data[:at] + new + data[at + draw(st.booleans()) :]
