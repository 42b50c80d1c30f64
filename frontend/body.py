"""What of a request's body decides its way: parsed once, at the edge, and never re-encoded.

Only `model` and `stream` must have their types. Of everything else the text is taken where its shape is known
and ignored where it is not: whether a request makes sense is for the engine to say.

A body of very many values is not taken apart: every value becomes an object, and 60 MiB of `{},` stopped the loop, with
all streams on it, for half a minute and took 2 GiB. It is only skimmed, which validates it and makes nothing.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from broker.errors import UNDECODABLE, BadRequest
from broker.faces import PENSTOCK, Estimate, Face
from broker.faces.go import complaint
from frontend.lifting import decode_chat
from frontend.texts import collect, collect_chat

Estimator = Callable[[list[str], int], Estimate]

_NO_TOOLS = msgspec.Raw()


class Message(msgspec.Struct, gc=False):
    """The text of a message: as it is written, or in parts."""

    content: Any = None
    text: Any = None


class Body(msgspec.Struct, gc=False):
    """The members that matter. Measured on 1 KiB and 32 KiB of chat: benchmarks/test_dispatch.py."""

    model: str | None = None
    stream: bool | None = None
    session_id: Any = None
    messages: Any = None
    prompt: Any = None
    input: Any = None
    tools: msgspec.Raw = _NO_TOOLS
    """As the client wrote them, which is the same for all of its requests."""

    def session(self) -> str | None:
        named = self.session_id
        if named is None:  # of nearly all
            return None
        return str(named) if isinstance(named, str | int) and named != "" else None

    def text(self, estimate: Estimator = PENSTOCK.estimate) -> Estimate:
        """The prompt's text, and its estimated tokens."""
        texts: list[str] = []
        ids = 0
        if self.messages is not None:
            ids = collect(self.messages, texts)
        if self.prompt is not None:
            ids += collect(self.prompt, texts)
        if self.input is not None:
            ids += collect(self.input, texts)
        return estimate(texts, ids)

    def tools_text(self) -> str:
        """What an engine puts in front of the prompt's text."""
        if self.tools is _NO_TOOLS:  # of nearly all
            return ""
        tools = bytes(self.tools)
        return "" if tools in (b"", b"null", b"[]") else tools.decode("utf-8", "replace")

    def token_ids(self) -> Sequence[int]:
        """Of a prompt or an input without text; those of several prompts one after another."""
        ids = array("q")
        for value in (self.prompt, self.input):
            if isinstance(value, list) and value:
                try:
                    for part in value if isinstance(value[0], list) else [value]:
                        ids.extend(part)
                except (TypeError, OverflowError):  # no ids after all: the engine's business
                    return ()
        return ids

    def tags(self) -> tuple[tuple[str, str], ...]:
        """What others call the request, by the names that log lines have for it."""
        return ()


class FreeBody(Body, gc=False):
    """The members that matter to a face that leaves their types to the engine."""

    model: Any = None
    stream: Any = None
    req_id: Any = None
    extra_body: Any = None

    def text(self, estimate: Estimator = PENSTOCK.estimate) -> Estimate:
        """As FastDeploy's router reads it: of messages their text, whole or in parts of type `text`; of a prompt, or of
        a list of them, what is text."""
        texts: list[str] = []
        for message in self.messages if isinstance(self.messages, list) else ():
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, str):
                texts.append(content)
            elif isinstance(content, list):
                parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
                texts += [text for part in parts if isinstance(text := part.get("text"), str)]
        prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        texts += [prompt for prompt in prompts if isinstance(prompt, str)]
        return estimate(texts, len(self.token_ids()))

    def tools_text(self) -> str:
        """FastDeploy's router schedules by messages and prompts alone."""
        return ""

    def session(self) -> str | None:
        extra = self.extra_body if isinstance(self.extra_body, dict) else {}
        return _word(self.session_id) or _word(extra.get("session_id")) or None

    def tags(self) -> tuple[tuple[str, str], ...]:
        return ("req_id", _word(self.req_id)), ("session_id", self.session() or "")


class Crowded(FreeBody, gc=False):
    """A body of very many values, of which only what is short was read."""

    size: int = 0
    """Bytes of the prompt, the input and the messages."""

    def text(self, estimate: Estimator = PENSTOCK.estimate) -> Estimate:
        return estimate([], self.size // _BYTES_PER_TOKEN)

    def token_ids(self) -> Sequence[int]:
        return ()


class Skimmed(msgspec.Struct, gc=False):
    """The members of such a body, as they are written."""

    model: msgspec.Raw = msgspec.Raw()
    stream: msgspec.Raw = msgspec.Raw()
    session_id: msgspec.Raw = msgspec.Raw()
    req_id: msgspec.Raw = msgspec.Raw()
    extra_body: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


class ChatBody(Body, gc=False):
    """The same where messages are objects, as they are in every chat: each is looked at, and nothing else is made of
    it."""

    messages: list[Message] | None = None

    def text(self, estimate: Estimator = PENSTOCK.estimate) -> Estimate:
        texts: list[str] = []
        ids = 0
        if self.messages is not None:
            ids = collect_chat(self.messages, texts)
        if self.prompt is not None:
            ids += collect(self.prompt, texts)
        if self.input is not None:
            ids += collect(self.input, texts)
        return estimate(texts, ids)


_chat_decoder = msgspec.json.Decoder(ChatBody)
_decoder = msgspec.json.Decoder(Body)
_free_decoder = msgspec.json.Decoder(FreeBody | None)
_skimming_decoder = msgspec.json.Decoder(Skimmed)

_CROWDED = 1 << 20
"""Commas and brackets; there are no more values than these."""
_SHORT = 4096
"""Bytes of a member that is read all the same."""
_BYTES_PER_TOKEN = 4


def parser(face: Face) -> Callable[[bytes], Body]:
    """`parse` or `parse_freely`, as the face wants it."""
    return parse if face.checks_body else parse_freely


def parse_freely(data: bytes) -> FreeBody:
    """Raises `BadRequest` for what is neither a JSON object nor null, in the words of a Go program."""
    read: FreeBody
    if is_crowded(data):
        read = _skim(data)
    else:
        try:
            read = _free_decoder.decode(data) or FreeBody()
        except UNDECODABLE:
            read = FreeBody(**_members(data, FreeBody))
    read.model = read.model if isinstance(read.model, str) else None
    read.stream = read.stream is True
    return read


def _members(data: bytes, kind: type[Body]) -> dict[str, Any]:
    try:
        tree = json.loads(data.decode(errors="replace"), parse_constant=_no_constant)  # as Go reads what is no UTF-8
    except (ValueError, RecursionError) as e:
        raise BadRequest(complaint(data, "map[string]interface {}")) from e
    if not isinstance(tree, dict):
        raise BadRequest(complaint(data, "map[string]interface {}"))
    return _fields(tree, kind)


def _fields(tree: dict[str, Any], kind: type[Body]) -> dict[str, Any]:
    fields = {name: tree.get(name) for name in kind.__struct_fields__}
    fields |= {name: _encodable(fields[name]) for name in ("model", "session_id", "req_id") if name in fields}
    return fields | {"tools": msgspec.Raw(json.dumps(tree.get("tools")).encode())}


def _encodable(value: object) -> object:
    """Names end up in answers and logs, which half a surrogate would break; nobody is called so."""
    return _word(value) if isinstance(value, str) else value


def _word(value: object) -> str:
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""


def parse(data: bytes) -> Body:
    """Raises `BadRequest` for what is no JSON object, or has a `model` or `stream` of the wrong type."""
    if is_crowded(data):
        read = _skim(data)
        _check_types(read.model, read.stream)
        return read
    try:
        chat: ChatBody = decode_chat(_chat_decoder, data)
        return chat
    except UNDECODABLE:
        pass
    try:
        return _decoder.decode(data)
    except UNDECODABLE as e:
        return _parse_slowly(data, e)


def _parse_slowly(data: bytes, fast: Exception) -> Body:
    """What msgspec refuses once more with the parser that engines use, which takes lone surrogates and 1e999.

    A client that cuts a text within an emoji sends such a surrogate; every Python engine answers it.
    """
    try:
        tree = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise BadRequest(f"the body is not valid JSON: {fast}") from e
    if not isinstance(tree, dict):
        raise BadRequest("the body must be a JSON object")
    _check_types(tree.get("model"), tree.get("stream"))
    return Body(**_fields(tree, Body))


def _check_types(model: object, stream: object) -> None:
    for name, value, kind, word in (("model", model, str, "string"), ("stream", stream, bool, "boolean")):
        if not isinstance(value, kind | None):
            raise BadRequest(f"{name!r} must be a {word}", param=name)


def is_crowded(data: bytes) -> bool:
    """Whether there may be more than `_CROWDED` values: it is known without reading them."""
    return len(data) > _CROWDED and data.count(b",") + data.count(b"[") + data.count(b"{") > _CROWDED


def _skim(data: bytes) -> Crowded:
    try:
        parts = _skimming_decoder.decode(data)
    except UNDECODABLE as e:
        raise BadRequest(f"the body is not valid JSON, or no object: {e}") from e
    size = sum([len(memoryview(part)) for part in (parts.messages, parts.prompt, parts.input)])
    short = {
        "model": parts.model,
        "stream": parts.stream,
        "session_id": parts.session_id,
        "req_id": parts.req_id,
        "extra_body": parts.extra_body,
    }
    return Crowded(**{name: _shortly(name, part) for name, part in short.items()}, size=size)


def _shortly(name: str, part: msgspec.Raw) -> Any:
    size = len(memoryview(part))
    if size > _SHORT:
        if name == "model":
            raise BadRequest("'model' is too long", param="model")
        return None
    return msgspec.json.decode(part) if size else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
