"""Notices at once when a connection of a ZMQ socket was refused or has broken.

libzmq says so on a second socket only. Without it a killed engine shows by its silence, seconds later, while the
requests it has taken wait with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

_CONNECTED = int(zmq.EVENT_CONNECTED)
_DISCONNECTED = int(zmq.EVENT_DISCONNECTED)
_REFUSED = int(zmq.EVENT_CLOSED) | int(zmq.EVENT_CONNECT_RETRIED)


class Monitor:
    """Calls `broken(endpoint)` on the loop's thread when the connection to an endpoint failed or ended.

    Endpoints are named as LAST_ENDPOINT names them after `connect`. What the peer had sent before is readable by
    then. An event may be late: an endpoint connected anew is protected by the number of its file descriptor.
    """

    def __init__(self, socket: zmq.Socket[bytes], loop: asyncio.AbstractEventLoop, broken: Callable[[str], None]):
        self._loop = loop
        self._broken = broken
        self._connected: dict[str, int] = {}
        """The file descriptor of each endpoint's connection."""
        self._watched = socket
        self._socket = socket.get_monitor_socket(_CONNECTED | _DISCONNECTED | _REFUSED)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._read)
        self._read()  # the FD signals nothing before the socket was found empty once

    def close(self) -> None:
        """Before the watched socket is closed."""
        self._loop.remove_reader(self._fd)
        self._watched.disable_monitor()
        self._socket.close(linger=0)

    def forget(self, endpoint: str) -> None:
        """We have ended this connection ourselves."""
        self._connected.pop(endpoint, None)

    def _read(self) -> None:
        while True:  # events are rare and few; the FD signals only the first of them
            try:
                message = parse_monitor_message(self._socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            event, value = int(message["event"]), message["value"]
            endpoint = message["endpoint"].decode("utf-8", "replace")
            if event == _CONNECTED:
                self._connected[endpoint] = value
            elif event == _DISCONNECTED:
                if self._connected.get(endpoint) == value:
                    del self._connected[endpoint]
                    self._broken(endpoint)
            elif endpoint not in self._connected:
                self._broken(endpoint)
