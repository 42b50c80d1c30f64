"""One request at an ASGI application, as a server would make it; the test plays the server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message

from frontend.upstream.base import Headers
from tests.support.waiting import PATIENCE_S


class Exchange:
    """`async with Exchange(app, ...)` starts the request; leaving the block waits for the application's end."""

    def __init__(
        self,
        app: ASGIApp,
        path: str = "/v1/chat/completions",
        *parts: bytes,
        headers: Headers | None = None,
        query: bytes = b"",
        method: str = "POST",
        whole: bool = True,
    ) -> None:
        """The body comes in `parts`; with `whole` false it goes on after them."""
        self._app = app
        self._scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "headers": headers or [],
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
        }
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        for number, part in enumerate(parts or (b"",), 1):
            more = not whole or number < len(parts)
            self._incoming.put_nowait({"type": "http.request", "body": part, "more_body": more})
        self.sent: list[Message] = []
        self.received = 0
        self.writable = asyncio.Event()
        self.writable.set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Exchange:
        self._task = asyncio.create_task(self._app(self._scope, self._receive, self._send))
        await self.turns()
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        assert self._task is not None
        if kind is not None:
            self._task.cancel()
        await asyncio.wait_for(self._task, PATIENCE_S)

    def leave(self) -> None:
        """The client disconnects."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    def cancel(self) -> None:
        """The server gives the request up."""
        assert self._task is not None
        self._task.cancel()

    @property
    def done(self) -> bool:
        return self._task is not None and self._task.done()

    async def turns(self, count: int = 20) -> None:
        """Lets everything that can happen without further input happen."""
        for _ in range(count):
            await asyncio.sleep(0)

    async def _receive(self) -> Message:
        message = await self._incoming.get()
        self.received += 1
        return message

    async def _send(self, message: Message) -> None:
        await self.writable.wait()
        self.sent.append(message)

    # -- the answer --------------------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def complete(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)

    def json(self) -> Any:
        return json.loads(self.body)


async def ask(app: ASGIApp, path: str = "/v1/chat/completions", *parts: bytes, **fields: Any) -> Exchange:
    """A request from its beginning to its end."""
    async with Exchange(app, path, *parts, **fields) as exchange:
        pass
    return exchange
