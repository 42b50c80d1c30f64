"""Writes to a connection's socket past its transport, which is asked only for what does not go out at once.

A transport that holds nothing writes at once what it is given; but from its `write` to the system call it is far, and
each answer and each token goes that way. So the call is made here (`_send.c`, where it is compiled) while the transport
has nothing to write itself, and what the socket does not take, or any error, is left to the transport as if nothing had
been tried. Over TLS, and where nothing is compiled, everything is the transport's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from shm.compiled import is_wanted

send: Callable[[int, bytes], int] | None = None
"""None: it is not compiled, or not wanted."""
if is_wanted():
    with contextlib.suppress(ImportError):
        from frontend import _send

        send = _send.send

NONE: Final = -1


def descriptor(transport: asyncio.WriteTransport) -> int:
    """Of the socket that takes this transport's bytes as they are; `NONE` if there is none, or nothing to send with.

    It may be used only while the transport is not closing: afterwards the number is another connection's.
    """
    if send is None or transport.get_extra_info("sslcontext") is not None:
        return NONE
    socket = transport.get_extra_info("socket")
    return NONE if socket is None else int(socket.fileno())
