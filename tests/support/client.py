"""A client that never retries and forgets nothing: what was asked, and every byte that came back, by id.

    client = Client(port)
    exchange = await client.send("/v1/chat/completions", chat("Hello"), id="a1")      the request is on its way
    await exchange.first_byte                                                         or .leave(): the client goes
    await exchange.ended                                                              FINISHED, BROKEN or LEFT
    client.ledger["a1"].text()

One connection per request, so that a broken one is that request's alone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Mapping
from enum import StrEnum
from typing import Any

import httptools

from tests.support.waiting import PATIENCE_S


class State(StrEnum):
    OPEN = "open"
    FINISHED = "finished"  # the answer is whole, as HTTP counts
    BROKEN = "broken"  # the connection failed, or ended in the middle of the answer
    LEFT = "left"  # the client went away


class Exchange(asyncio.Protocol):
    """One request and all that came back."""

    def __init__(self, id: str, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.id = id
        self.state = State.OPEN
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.sent_at = 0.0
        self.first_byte_at = 0.0
        self.ended_at = 0.0
        self._request = request
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._first_byte: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[State] = loop.create_future()

    def __repr__(self) -> str:
        return f"Exchange({self.id!r}, {self.state}, {self.status}, {len(self.body)} bytes)"

    # -- for tests -----------------------------------------------------------------------------------------

    @property
    def first_byte(self) -> Awaitable[None]:
        """The first byte of the body is there, or there will be none."""
        return asyncio.shield(self._first_byte)

    @property
    def ended(self) -> Awaitable[State]:
        return asyncio.shield(self._ended)

    def leave(self) -> None:
        """The client goes away without a word (RST where data is under way)."""
        self._end(State.LEFT)

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[str]:
        """The data of each complete SSE event."""
        whole = bytes(self.body).decode()
        blocks = whole.replace("\r\n", "\n").split("\n\n")[:-1]
        lines = [line for block in blocks for line in block.split("\n")]
        return [line[5:].removeprefix(" ") for line in lines if line.startswith("data:")]

    def text(self) -> str:
        """What the model said, streamed or not, chat or completion."""
        answers = [self.json()] if "json" in self.headers.get("content-type", "") else self._parsed()
        parts = []
        for answer in answers:
            for choice in answer.get("choices", []):
                said = choice.get("delta") or choice.get("message") or choice
                parts.append(said.get("content") or said.get("text") or "")
        return "".join(parts)

    def fingerprint(self) -> str:
        """Which simulated engine answered (`system_fingerprint`); empty if nobody said."""
        answers = [self.json()] if "json" in self.headers.get("content-type", "") else self._parsed()
        return next((name for answer in answers if (name := answer.get("system_fingerprint"))), "")

    def error(self) -> dict[str, Any] | None:
        """The error object of the answer or of the stream's error event."""
        answers = [self.json()] if "json" in self.headers.get("content-type", "") else self._parsed()
        for answer in answers:
            if "error" in answer:
                found: dict[str, Any] = answer["error"]
                return found
        return None

    @property
    def whole(self) -> bool:
        """Answered with success and to the end; a stream says so with [DONE]."""
        if self.state is not State.FINISHED or self.status != 200 or self.error() is not None:
            return False
        return "event-stream" not in self.headers.get("content-type", "") or self.events()[-1:] == ["[DONE]"]

    def _parsed(self) -> list[dict[str, Any]]:
        return [json.loads(data) for data in self.events() if data != "[DONE]"]

    # -- asyncio and httptools -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.sent_at = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end(State.BROKEN)

    def connection_lost(self, exc: Exception | None) -> None:
        # A body that is ended by the connection's end is not used by Penstock: an end before the end is a break.
        self._end(State.BROKEN)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self._first_byte.done():
            self.first_byte_at = time.monotonic()
            self._first_byte.set_result(None)
        self.body += body

    def on_message_complete(self) -> None:
        if self.status >= 200:
            self._end(State.FINISHED)

    def _end(self, state: State) -> None:
        if self._ended.done():
            return
        self.state = state
        self.ended_at = time.monotonic()
        self._ended.set_result(state)
        if not self._first_byte.done():
            self._first_byte.set_result(None)
        if self._transport is not None:
            self._transport.abort()


class Client:
    """Sends requests to one address and keeps the ledger of all of them."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.host, self.port = host, port
        self.ledger: dict[str, Exchange] = {}

    async def send(
        self,
        path: str,
        body: object = None,
        *,
        id: str | None = None,
        method: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Exchange:
        """Puts a request on its way. `body`: bytes as they are, anything else as JSON, None = a GET."""
        id = id or f"request-{len(self.ledger)}"
        assert id not in self.ledger, f"{id} was sent before, and this client never retries"
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = {
            "Host": f"{self.host}:{self.port}",
            "X-Request-Id": id,
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }
        head = f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
        exchange = self.ledger[id] = Exchange(id, head.encode() + content)
        try:
            await asyncio.get_running_loop().create_connection(lambda: exchange, self.host, self.port)
        except OSError:
            exchange._end(State.BROKEN)
        return exchange

    async def ask(self, path: str, body: object = None, *, within: float = PATIENCE_S, **options: Any) -> Exchange:
        """`send`, and wait for the end."""
        exchange = await self.send(path, body, **options)
        await asyncio.wait_for(exchange.ended, within)
        return exchange

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        for exchange in self.ledger.values():
            exchange.leave()


def chat(prompt: str = "Hello", *, stream: bool = True, **fields: object) -> dict[str, object]:
    """A chat request; the simulated engine says up to `max_tokens` words, and with `ignore_eos` exactly as many."""
    return {"messages": [{"role": "user", "content": prompt}], "stream": stream, **fields}
