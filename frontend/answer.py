"""A client's answer over ASGI: a sink that gathers what arrives and sends it on in batches."""

from __future__ import annotations

import asyncio

from starlette.types import Message, Receive, Send

from broker.errors import PenstockError
from broker.faces import PENSTOCK, Face
from frontend import errors, headers
from frontend.forward import Forward
from frontend.upstream.base import Headers, Sink

PAUSE_AT = 64 * 1024
"""Bytes held for a client that does not keep up, before its instance is asked to pause; fewer if the settings say so.
What a native engine sends nevertheless is held by its transport, up to the bound of the settings."""


class Answer(Sink):
    """Owns the `Forward` that fills it, from `serve` to its end, however that comes.

    Chunks that arrive while a `send` is under way go out together with the next one: a fast client gets each at
    once, a slow one costs no more sends than it can take.
    """

    __slots__ = (
        "_chunks",
        "_ended",
        "_error",
        "_face",
        "_forward",
        "_gone",
        "_head",
        "_held",
        "_ident",
        "_last",
        "_pause_at",
        "_paused",
        "_waiter",
    )

    def __init__(self, ident: bytes, bound: int = PAUSE_AT, face: Face = PENSTOCK) -> None:
        """`ident`: what the answer is called, or nothing; `bound`: what one slow client may hold, in bytes."""
        self._ident = ident
        self._face = face
        self._pause_at = min(PAUSE_AT, bound)
        self._forward: Forward | None = None
        self._head: tuple[int, Headers] | None = None
        self._chunks: list[bytes] = []
        self._last = b"\n\n"
        self._held = 0
        self._paused = False
        self._ended = False
        self._gone = False
        self._error: tuple[int, bytes, Headers] | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def serve(self, forward: Forward, receive: Receive, send: Send) -> None:
        """Runs the request to its end. The request's body has been read: what `receive` still says is that the
        client left, which is watched from before the first byte to the last."""
        self._forward = forward
        watcher = asyncio.get_running_loop().create_task(self._watch(receive))
        try:
            forward.begin()
            await self._send_all(send)
        finally:
            forward.cancel()
            watcher.cancel()
            await asyncio.wait((watcher,))

    # -- the sink ----------------------------------------------------------------------------------------------

    def start(self, status: int, found: Headers) -> None:
        self._head = status, found
        self._wake()

    def write(self, data: bytes) -> None:
        self._chunks.append(data)
        self._last = data
        self._held += len(data)
        if self._held > self._pause_at and not self._paused and self._forward is not None:
            self._paused = True
            self._forward.pause()
        self._wake()

    def finish(self) -> None:
        self._ended = True
        self._wake()

    def fail(self, error: PenstockError) -> None:
        if self._head is not None and headers.take_events(self._head[1]):
            self._chunks.append(last_event(error, self._last, self._face))
        else:  # made now: an error that ends several requests is told each one's own things in turn
            self._error = whole_error(error, self._ident, self._face)
        self._ended = True
        self._wake()

    # -- ASGI --------------------------------------------------------------------------------------------------

    async def _send_all(self, send: Send) -> None:
        while self._head is None and not self._ended and not self._gone:
            await self._more()
        if self._head is None:
            if self._error is not None and not self._gone:
                await _send_whole(send, *self._error)
            return
        status, found = self._head
        await send({"type": "http.response.start", "status": status, "headers": headers.for_client(found, self._ident)})
        while not self._gone:
            if self._chunks or self._ended:
                last = self._ended
                if last and self._error is not None and not self._chunks:
                    return  # without a last message: the server closes the connection, so that the cut is seen
                await send(self._batch(more=not last or self._error is not None))
                if self._paused:
                    self._paused = False
                    assert self._forward is not None
                    self._forward.resume()
                if last and self._error is None:
                    return
            else:
                await self._more()

    def _batch(self, *, more: bool) -> Message:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._held = 0
        return {"type": "http.response.body", "body": data, "more_body": more}

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        assert self._forward is not None
        self._forward.cancel()
        self._wake()

    async def _more(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def send_error(send: Send, error: PenstockError, ident: bytes = b"", face: Face = PENSTOCK) -> None:
    """A whole answer made of an error."""
    await _send_whole(send, *whole_error(error, ident, face))


async def _send_whole(send: Send, status: int, data: bytes, found: Headers) -> None:
    await send({"type": "http.response.start", "status": status, "headers": found})
    await send({"type": "http.response.body", "body": data})


# -- what both paths say of an error ---------------------------------------------------------------------------


def whole_error(error: PenstockError, ident: bytes, face: Face) -> tuple[int, bytes, Headers]:
    """Status, body and headers of an answer made of an error."""
    status, data, found = errors.whole(error, face)
    found.append((b"content-length", b"%d" % len(data)))
    if ident:
        found.append((headers.REQUEST_ID, ident))
    return status, data, found


def last_event(error: PenstockError, last: bytes, face: Face) -> bytes:
    """The error as the event that follows `last`, the bytes sent last; ends the one that was left half written."""
    cut = b"" if last.endswith((b"\n\n", b"\r\n\r\n")) else b"\n\n"
    return cut + errors.event(error, face)
