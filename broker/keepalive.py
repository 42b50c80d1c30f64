"""TCP keep-alive: a peer that vanished without a word is noticed within two minutes; the system takes two hours."""

from __future__ import annotations

import socket
from typing import Protocol

_OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)


class Settable(Protocol):
    """A socket, or what a transport shows of its own."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def keep_alive(sock: Settable) -> None:
    """Ask for it on a connection, or on a listener for every connection that it will accept."""
    for level, option, value in _OPTIONS:
        sock.setsockopt(level, option, value)
