"""Where a native engine listens, as its registration says it: `ipc://PATH`, `ipc://@NAME` (abstract), `tcp://HOST:PORT`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from broker.errors import ConnectFailed

_IPC = "ipc://"


class Address:
    """Raises `ConnectFailed` for a URL it cannot use."""

    __slots__ = ("_host", "_path", "_port")

    def __init__(self, url: str) -> None:
        self._path = self._host = ""
        self._port = 0
        if url.startswith(_IPC):
            self._path = url.removeprefix(_IPC)
        else:
            try:
                parts = urlsplit(url)
                self._host, self._port = parts.hostname or "", parts.port or 0
            except ValueError as e:
                raise ConnectFailed(f"the URL {url!r} is malformed: {e}") from e
            if parts.scheme != "tcp" or parts.path or not self._port:
                self._host = ""
        if not self._path and not self._host:
            raise ConnectFailed(f"the URL {url!r} cannot be used: tcp://host:port or ipc://path is expected")

    async def connect(self, loop: asyncio.AbstractEventLoop, protocol: Callable[[], asyncio.Protocol]) -> None:
        """Raises OSError."""
        if self._host:
            await loop.create_connection(protocol, self._host, self._port)
            return
        path = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await loop.sock_connect(unix, path)
            await loop.create_unix_connection(protocol, sock=unix)
        except BaseException:
            unix.close()
            raise
