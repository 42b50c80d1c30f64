"""The inference routes: any `POST /v1/…`. Reads the body, understands what decides its way, and lets it go.

What a request means and how it is refused is said here once, for both ways in: over ASGI (`Inference.__call__`), and
without it (`frontend.lean`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from starlette.types import Receive, Scope, Send

from broker.config import Config
from broker.counters import TotalColumn
from broker.engines.pd import request_id
from broker.errors import BadRequest, BodyTooLarge, PairsOnly
from broker.faces import Estimate, face_of
from broker.narrator import printable
from broker.policies import need_index
from broker.route import RouteRequest
from broker.splice import replace_member
from frontend import body, headers
from frontend.account import access, count_response
from frontend.answer import Answer, send_error
from frontend.forward import Forward
from frontend.forwarder import Forwarder
from frontend.line_ends import LineEnds
from frontend.receiving import Receiving
from frontend.request_head import RequestHead, read_head, says_too_large
from frontend.story import Stories, Story
from frontend.upstream.base import Sink, UpstreamRequest

PAIRED_PATHS = frozenset(("/v1/chat/completions", "/v1/completions"))
"""What prefill/decode pairs can do."""
MOST_NAME = 1024
"""Characters of a model's name: it is kept with what is remembered of a request, and said back. None is so long."""


class ClientGone(Exception):
    """The client left before its request was whole."""


class Inference:
    """The inference routes of one frontend; an ASGI application."""

    def __init__(self, config: Config, forwarder: Forwarder, stories: Stories | None = None) -> None:
        self.face = face = face_of(config)
        # Asked for every request; a face has no compiled attributes.
        self._estimate: Callable[[list[str], int], Estimate] = face.estimate
        self._names_requests = face.names_requests
        self._relays_lines = face.relays_lines
        self._stories = stories
        self._parse = body.parser(self.face)
        self.limit = config.server.max_body_bytes
        self.receiving = Receiving(config.server.max_receiving_bytes)
        self.bound = config.upstream.stream_buffer_bytes
        """What one slow client may hold, in bytes."""
        self._aliases = config.models.aliases
        self._pairs = config.server.splitwise
        self._looks = need_index(config)
        self._forwarder = forwarder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = read_head(scope["path"], _target(scope), scope["headers"], names=self.face.names_requests)
        ident = head.ident or headers.new_id()
        answer = Answer(self.shown(ident), self.bound, self.face)
        try:
            forward = await self._read(scope, receive, head, ident, answer)
        except BadRequest as error:
            self.refuse(head.path, ident, error, _client(scope))
            await send_error(send, error, self.shown(ident), self.face)
        except ClientGone:
            pass
        else:
            await answer.serve(forward, receive, send)

    async def _read(self, scope: Scope, receive: Receive, head: RequestHead, ident: bytes, answer: Answer) -> Forward:
        """The request as it will go out. A function of its own: its locals, the body among them, end with it, and
        not with the answer's last byte."""
        data = await read_body(scope, receive, self.limit, self.receiving)
        return self.forward(head, data, ident, answer, _client(scope))

    def serves(self, path: str) -> bool:
        """Whether it is one of the face's routes."""
        return self.face.paths is None or path in self.face.paths

    def shown(self, ident: bytes) -> bytes:
        """What engine and client hear of a request's id: nothing, if the face gives requests no names."""
        return ident if self._names_requests else b""

    def forward(self, head: RequestHead, data: bytes, ident: bytes, sink: Sink, client: str = "") -> Forward:
        """The request as it will go out, its answer to `sink`; not begun yet. `client` is its address. Raises
        `BadRequest`."""
        name = self._paired(head.path, data) if self._pairs else ""
        stream = False
        story: Story | None = None
        if head.is_read:
            read = self._parse(data)
            model, stream, session, tools, text, tokens = body.gist(read, self._estimate)
            if model is not None and len(model) > MOST_NAME:
                raise BadRequest(f"'model' is longer than {MOST_NAME} characters", param="model")
            if self._aliases and model is not None and (meant := self._aliases.get(model)) is not None:
                model = meant
                data = replace_member(data, "model", msgspec.json.encode(meant))
            ids: Sequence[int] = ()
            if tools and tokens:
                tokens += self._estimate([tools], 0)[1]
            if not self._looks:
                text = ""  # not kept for nobody
            elif text:
                text = tools + text
            else:
                ids = read.token_ids()
            if self._stories is not None:
                tags = (("trace_id", head.trace()), *read.tags(), ("request_id", name))
                story = self._stories.begin("POST", head.target, client, tags)
                story.parsed(stream=stream)
            session = session or head.session
            route = RouteRequest(model=model, session=session, prompt=text, prompt_ids=ids, prompt_tokens=tokens)
        else:
            route = RouteRequest(session=head.session)
        if stream and self._relays_lines:
            sink = LineEnds(sink)
        shown = self.shown(ident)
        request = UpstreamRequest(
            path=head.target,
            headers=[*head.headers, (headers.REQUEST_ID, shown)] if shown else head.headers,
            body=data,
            forms=head.forms,
            ident=shown,
            stream=stream,
            request_id=name,
        )
        return self._forwarder.forward(ident, route, request, sink, story, asks_why=head.asks_why)

    def _paired(self, path: str, data: bytes) -> str:
        """FastDeploy's name of a request for a pair. Raises `BadRequest` for what pairs cannot do."""
        if path not in PAIRED_PATHS:
            raise PairsOnly(
                f"{path} is not served here: there are only prefill/decode pairs (server.splitwise), and they do "
                f"{' and '.join(sorted(PAIRED_PATHS))}"
            )
        try:
            return request_id(data, refuse=self.face.guards_transfer)
        except BadRequest:
            self._parse(data)  # the face's own words, if it is no JSON object
            raise

    def refuse(self, path: str, ident: bytes, error: BadRequest, client: str = "") -> None:
        """Counts a request of which nothing is forwarded, and writes its log line."""
        counters = self._forwarder.counters
        status = self.face.error(error).status
        counters.count(TotalColumn.REJECTED)
        count_response(counters, status)
        if self._stories is not None:
            story = self._stories.begin("POST", path, client)
            story.refused(error)
            story.ended(status, 0.0, completed=False)
        elif access.is_on:
            access.write(f"id={ident.decode()} path={printable(path)} status={status} outcome=rejected")


async def read_body(scope: Scope, receive: Receive, limit: int, receiving: Receiving) -> bytes:
    """The request's whole body. Raises `BodyTooLarge`, before anything is read if the client said its length,
    `ReceivingFull`, and `ClientGone`."""
    if says_too_large(scope["headers"], limit):
        raise too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            if size + len(part) > limit:
                raise too_large(limit)
            if not message.get("more_body", False):
                return b"".join((*parts, part)) if parts else part
            if part:
                receiving.take(len(part))
                size += len(part)
                parts.append(part)
    finally:
        receiving.give_back(size)


def too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes")


def _client(scope: Scope) -> str:
    client = scope.get("client")
    return client[0] if client else ""


def _target(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return (raw + b"?" + query if query else raw).decode("latin-1")
