"""The contract between a request and the transport that carries it.

    Upstream.open(instance, request, sink) -> Call
                                       |        cancel / pause / resume      by whoever forwards
                                       +------> start, write*, finish | fail  by the transport

Rules, tested for every transport in tests/contract:
* `open` returns at once and calls nothing on the sink before it has returned.
* The sink hears `start` at most once, then any number of `write`, then exactly one of `finish` and `fail`
  (`fail` may come without `start`). After `cancel` it hears nothing more.
* `cancel` is idempotent, aborts the work at the engine at once and frees what the call held.
* Everything happens on the event loop's thread; there is no task, future or event per chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from mypy_extensions import mypyc_attr

from broker.errors import PenstockError
from broker.types import Instance

if TYPE_CHECKING:
    from frontend._conduit import Conduit

Headers = list[tuple[bytes, bytes]]
"""As in ASGI: names in lower case, order kept, repeats allowed."""

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
"""Headers that belong to one connection (RFC 9110, 7.6.1) and are never passed on."""


class Forms:
    """What transports have made of a path and headers, for the next request that differs in body and name alone."""

    def __init__(self) -> None:
        self.http: tuple[bytes, bytes] | None = None
        """The request line and the beginning of the Host line; the headers, each after its line break."""
        self.native: tuple[bytes, bytes] | None = None
        """Path and headers in msgpack (`zmq_request.py`)."""


class UpstreamRequest:
    """What is sent to an instance, whatever the transport. It does not change."""

    def __init__(
        self,
        *,
        path: str,
        headers: Headers,
        body: bytes,
        forms: Forms | None = None,
        ident: bytes = b"",
        method: str = "POST",
        stream: bool = False,
        transfer: bytes = b"",
        request_id: str = "",
    ) -> None:
        self.path: Final = path
        """Path and query as the client asked for, for example `/v1/chat/completions`."""
        self.headers: Final = headers
        """End-to-end headers of the client; neither hop-by-hop ones nor Host nor Content-Length."""
        self.body: Final = body
        self.forms: Final = forms
        """Of the path and the headers but the last, `x-request-id`, if the request has an `ident`. None: nobody else
        has the same ones; so whoever replaces either takes the forms away."""
        self.ident: Final = ident
        """The request's name, harmless in a header. Nothing: engines are not told one."""
        self.method: Final = method
        """Native engines are asked by POST alone and are not told."""
        self.stream: Final = stream
        self.transfer: Final = transfer
        """The peer's transfer metadata in prefill/decode pairs, for native engines."""
        self.request_id: Final = request_id
        """With pairs: what FastDeploy's engines call the request, the client's own word or a new one."""

    def __repr__(self) -> str:
        return f"<UpstreamRequest {self.method} {self.path}, {len(self.body)} bytes>"

    def leg(self, body: bytes, headers: Headers, *, stream: bool, transfer: bytes) -> UpstreamRequest:
        """What one instance of a pair is sent of it."""
        return UpstreamRequest(
            path=self.path,
            headers=headers,
            body=body,
            ident=self.ident,
            method=self.method,
            stream=stream,
            transfer=transfer,
            request_id=self.request_id,
        )


class AnswerHead:
    """Of an answer with the status 200 and a Content-Length; good for every other that differs in the length alone."""

    def __init__(self, headers: Headers) -> None:
        self.headers = headers
        """End-to-end ones; the length is that of the answer that was seen first."""
        self.lines: tuple[bytes, bytes] | None = None
        """What was made of it for clients: the lines up to the length, and behind it. Kept here by who writes them."""

    def fitting(self, data: bytes) -> Headers:
        """The headers of the answer whose body is `data`."""
        length = b"%d" % len(data)
        return [(name, length if name == b"content-length" else value) for name, value in self.headers]


@mypyc_attr(allow_interpreted_subclasses=True)
class Sink:
    """Who receives an answer.

    A base class, where a protocol would do for the types: compiled code calls a protocol's methods by their names, and
    that costs more than most of what they do for an event. (A `Call` is told something once in a while.)
    """

    __slots__ = ()

    def start(self, status: int, headers: Headers) -> None:
        """Status and end-to-end headers (Content-Length kept when the engine gave one)."""
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        """Body bytes as they came; never empty."""
        raise NotImplementedError

    def finish(self) -> None:
        """The answer is whole."""
        raise NotImplementedError

    def fail(self, error: PenstockError) -> None:
        """It will never be whole: the engine, the way to it, or a limit ended it. What the error says to clients names
        no address (`PenstockError.public`)."""
        raise NotImplementedError

    @property
    def takes_whole(self) -> bool:
        """What is whole may come as it is, by the next two. Transports may use them then; none needs to."""
        return False

    def answer(self, head: AnswerHead, data: bytes) -> None:
        """`start`, `write` and `finish` in one: status 200, and `data` is never empty."""
        self.start(200, head.fitting(data))
        self.write(data)
        self.finish()

    def chunk(self, framed: bytes, size: int) -> None:
        """`write` of one whole chunk of that many bytes in HTTP's chunked coding, without extensions; never empty."""
        self.write(framed[-size - 2 : -2])

    def conduit(self) -> Conduit | None:
        """The short way for whatever comes next (`frontend/conduit.py`), good until anything else is said to this sink;
        None: there is none now. Only while an answer with whole chunks is under way."""
        return None

    def unsent(self, data: bytes) -> None:
        """What the conduit could not send. (Only of those that gave one.)"""
        raise NotImplementedError


class Call(Protocol):
    """One request under way at one instance."""

    def cancel(self) -> None:
        """The answer is no longer wanted."""

    def pause(self) -> None:
        """Write no more for now. A transport that cannot hold its engine back may buffer up to its bound, then fail.

        May be called from within `start` and `write`; what was read but not yet passed on is held.
        """

    def resume(self) -> None:
        """Write again; what was held comes in a later turn of the loop."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Upstream:
    """A transport. A base class, as `Sink` is one."""

    def open(self, instance: Instance, request: UpstreamRequest, sink: Sink) -> Call:
        raise NotImplementedError

    def close(self) -> None:
        """Ends every connection; calls still open hear `fail`."""
        raise NotImplementedError


class Upstreams:
    """Every transport that there is."""

    def upstream(self, instance: Instance) -> Upstream:
        """The one that leads there."""
        raise NotImplementedError
