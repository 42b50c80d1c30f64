"""uvicorn under our own signals, and with a way to write what is not HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from broker.worker.sim.http import NO_HEAD

NOT_HTTP = b"this is\r\nno head of HTTP\r\n\r\n"


class Server(uvicorn.Server):
    """Ends when `should_exit` is set, not by a signal; `listening` tells that it answers."""

    def __init__(self, app: ASGIApp, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                lifespan="off",
                log_level="critical",  # an answer cut short on purpose is no news
                access_log=False,
                timeout_graceful_shutdown=max(1, int(drain_s)),
                timeout_keep_alive=75,
            )
        )
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class _Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast("asyncio.Transport", _Spoiler(cast("asyncio.Transport", transport))))


class _Spoiler:
    """A transport that replaces a head marked with `NO_HEAD`. uvicorn itself refuses to write a wrong one."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def write(self, data: bytes) -> None:
        self._transport.write(NOT_HTTP if NO_HEAD[0] in data[:2048] else data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
