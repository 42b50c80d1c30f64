"""Asking a native engine who it is, as a frontend would greet it (`docs/wire.md`, data connection)."""

from __future__ import annotations

import asyncio
from typing import Any

import zmq
import zmq.asyncio

from broker import wire
from broker.errors import WireError


async def ask_incarnation(context: zmq.Context[Any], endpoint: str, timeout_s: float) -> bytes | None:
    """The incarnation that answers a `DataHello` at the endpoint; None = no valid answer in time.

    Epoch 0 is older than any: the engine learns nothing from it about the scheduler.
    """
    try:
        socket = zmq.asyncio.Context.shadow(context).socket(zmq.DEALER)
    except zmq.ZMQError:  # the context has no more sockets to give
        return None
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 8)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_CONTROL_BYTES)
        socket.connect(endpoint)
        async with asyncio.timeout(timeout_s):
            await socket.send(wire.encode(wire.DataHello(wire.PROTOCOL, 0)))
            while True:
                welcome = wire.decode(wire.data_to_frontend, (await socket.recv_multipart())[-1])
                if isinstance(welcome, wire.DataWelcome):
                    valid = welcome.protocol == wire.PROTOCOL and len(welcome.incarnation) == wire.INCARNATION_BYTES
                    return welcome.incarnation if valid else None
    except (TimeoutError, zmq.ZMQError, WireError):
        return None
    finally:
        socket.close()
