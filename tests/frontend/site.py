"""A frontend without sockets, for tests of what its clients see."""

from __future__ import annotations

import asyncio
import pathlib

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from broker.config import Server
from broker.types import Instance
from frontend.api import Inference
from frontend.lean import Lean
from frontend.upstream.base import Sink, Upstream, UpstreamRequest
from tests.frontend.conformance import LIMIT
from tests.frontend.fakes import FakeCall, Frontend
from tests.frontend.wire import Path, Wire

SERVER = Server(max_body_bytes=LIMIT)


class Engine(Upstream):
    """An upstream that answers every request at once, in a turn of its own."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def open(self, instance: Instance, request: UpstreamRequest, sink: Sink) -> FakeCall:
        call = FakeCall(instance, request, sink)
        self.bodies.append(request.body)
        asyncio.get_running_loop().call_soon(self._answer, call)
        return call

    def close(self) -> None: ...

    def _answer(self, call: FakeCall) -> None:
        if not call.cancelled:
            call.answer(b"{}", headers=[(b"content-length", b"2")])


class Site:
    """A frontend whose engine answers, reached by connections of either path."""

    def __init__(self, path: pathlib.Path, server: Server = SERVER) -> None:
        self.frontend = Frontend(path, "http://10.0.0.1:80", server=server)
        self.engine = Engine()
        self.frontend.forwarder._http = self.engine
        self.inference = Inference(self.frontend.config, self.frontend.forwarder)

        async def live(request: Request) -> Response:
            return Response(b"live")

        routes = [
            Route("/v1/{rest:path}", self.inference, methods=["POST"]),
            Route("/health", live, methods=["GET"]),
        ]
        self.app: ASGIApp = Starlette(routes=routes)

    def connect(self, path: Path, lean: Lean | None = None) -> Wire:
        """`lean`: for connections that are to share what they know."""
        return Wire(self.frontend, path, self.inference, self.app, lean)

    async def fed(self, path: Path, *reads: bytes) -> Wire:
        """A connection on which these have come, each dealt with before the next."""
        wire = self.connect(path)
        for read in reads:
            wire.feed(read)
            await wire.settle()
        return wire

    @property
    def is_idle(self) -> bool:
        return not self.frontend.forwarder.live and not any(self.frontend.in_flight)
