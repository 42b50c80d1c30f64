"""A sink that writes down what it hears and insists on the contract of `frontend.upstream.base`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from broker.errors import PenstockError
from frontend import conduit
from frontend.upstream.base import AnswerHead, Call, Headers, Sink

if TYPE_CHECKING:
    from frontend._conduit import Conduit

_ADDRESS = re.compile(r"://|127\.0\.0\.1|::1|localhost")


class RecordingSink(Sink):
    """`body`, `status`, `headers`, `error`; `events` in order. Set `on_start` or `on_write` to act from within.

    `call` must be given what `open` returned before the loop runs on: hearing anything earlier is a violation,
    and so is anything out of order or after `leave`. Tests end with `check()`.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.events: list[str] = []
        self.violations: list[str] = []
        self.status = 0
        self.headers: Headers = []
        self.pieces: list[bytes] = []
        self.error: PenstockError | None = None
        self.ended = asyncio.Event()
        self.on_start: Callable[[], None] = lambda: None
        self.on_write: Callable[[], None] = lambda: None
        self._left = False
        self._paused = False

    def __repr__(self) -> str:
        return f"<RecordingSink {' '.join(self.events)} status={self.status} body={self.body!r} error={self.error!r}>"

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    # -- what the test does --------------------------------------------------------------------------------

    def leave(self) -> None:
        """Cancels; from here on nothing may be heard."""
        assert self.call is not None
        self.call.cancel()
        self._left = True

    def pause(self) -> None:
        assert self.call is not None
        self.call.pause()
        self._paused = True

    def resume(self) -> None:
        assert self.call is not None
        heard = len(self.events)
        self._paused = False
        self.call.resume()
        if len(self.events) != heard:
            self.violations.append("heard something within resume")

    def check(self) -> None:
        assert self.violations == []

    # -- what the transport says ---------------------------------------------------------------------------

    def start(self, status: int, headers: Headers) -> None:
        self._hear("start")
        self.status = status
        self.headers = headers
        self.on_start()

    def write(self, data: bytes) -> None:
        self._hear("write")
        if not data:
            self.violations.append("empty write")
        self.pieces.append(bytes(data))
        self.on_write()

    def finish(self) -> None:
        self._hear("finish")
        self.ended.set()

    def fail(self, error: PenstockError) -> None:
        self._hear("fail")
        self.error = error
        said = error.public or error.message
        if _ADDRESS.search(said):
            self.violations.append(f"clients are told an address: {said}")
        self.ended.set()

    def _hear(self, event: str) -> None:
        self.events.append(event)
        if self.call is None:
            self.violations.append(f"{event} before open had returned")
        if self._left:
            self.violations.append(f"{event} after cancel")
        if self.ended.is_set():
            self.violations.append(f"{event} after the end")
        if (event == "start") == (self.status != 0) and event != "fail":
            self.violations.append(f"{event} out of order")
        if self._paused and event in ("start", "write"):
            self.violations.append(f"{event} while paused")


class WholeRecordingSink(RecordingSink):
    """One that also takes what is whole; `whole` counts how often it got something so."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = 0

    @property
    def takes_whole(self) -> bool:
        return True

    def answer(self, head: AnswerHead, data: bytes) -> None:
        self.whole += 1
        super().answer(head, data)

    def chunk(self, framed: bytes, size: int) -> None:
        self.whole += 1
        data = framed[-size - 2 : -2]
        if framed != b"%b\r\n%b\r\n" % (framed[: framed.index(b"\r\n")], data) or len(data) != size:
            self.violations.append("no whole chunk")
        self.write(data)


class FlowingSink(WholeRecordingSink):
    """One that lends its stream to the short way (frontend/conduit.py), whenever there is one: what goes that way comes
    out of a socket, and counts as heard when it is looked at. `lent` counts how often; `check` closes the socket."""

    def __init__(self) -> None:
        super().__init__()
        self.lent = 0
        self._raw = b""  # the beginning of a chunk
        self._conduit: Conduit | None = None
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)

    @property
    def body(self) -> bytes:
        self._look()
        return super().body

    def leave(self) -> None:
        self._look()
        super().leave()

    def pause(self) -> None:
        self._look()
        super().pause()

    def resume(self) -> None:
        self._look()
        super().resume()

    def check(self) -> None:
        self._look()
        self._ours.close()
        self._theirs.close()
        super().check()

    def conduit(self) -> Conduit | None:
        if conduit.compiled is None or self._paused:
            return None
        self._look()
        self.lent += 1
        self._conduit = conduit.compiled.Conduit(self._ours.fileno())
        return self._conduit

    def unsent(self, data: bytes) -> None:
        self._look()
        self._take(data)

    def _hear(self, event: str) -> None:
        self._look()
        if self._raw:
            self.violations.append(f"{event} within a chunk")
        if self._conduit is not None:  # it was good until now
            self._conduit.close()
            self._conduit = None
        super()._hear(event)

    def _look(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._theirs.fileno() >= 0:
                self._take(self._theirs.recv(1 << 20))

    def _take(self, data: bytes) -> None:
        if self._left or self._paused or self.ended.is_set():
            self.violations.append("something flowed where nothing may")
        self._raw += data
        while True:
            line, _, rest = self._raw.partition(b"\r\n")
            if not rest or len(rest) < int(line, 16) + 2:
                break
            self.pieces.append(rest[: int(line, 16)])
            self._raw = rest[int(line, 16) + 2 :]
