"""What of a request's body decides its way: parsed once, at the edge, and never re-encoded.

Only `model` and `stream` must have their types. Of everything else the text is taken where its shape is known
and ignored where it is not: whether a request makes sense is for the engine to say.

A body of very many values is not taken apart: every value becomes an object, and 60 MiB of `{},` stopped the loop, with
all streams on it, for half a minute and took 2 GiB. It is only skimmed, which validates it and makes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import msgspec
from msgspec.structs import astuple

from broker.errors import UNDECODABLE, BadRequest
from broker.faces import Face
from broker.faces.go import complaint
from frontend.lifting import decode_chat
from frontend.members import NO_TOOLS, Body, ChatBody, Crowded, Estimator, FreeBody, Skimmed, word
from frontend.texts import collect, collect_chat

_chat_decoder: Final = msgspec.json.Decoder(ChatBody)
_decoder: Final = msgspec.json.Decoder(Body)
_free_decoder: Final = msgspec.json.Decoder(FreeBody | None)
_skimming_decoder: Final = msgspec.json.Decoder(Skimmed)
_chat: Final = ChatBody
_no_tools: Final = NO_TOOLS
_astuple: Final = astuple

_CROWDED: Final = 1 << 20
"""Commas and brackets; there are no more values than these."""
_SHORT: Final = 4096
"""Bytes of a member that is read all the same."""


def parser(face: Face) -> Callable[[bytes], Body]:
    """`parse` or `parse_freely`, as the face wants it."""
    return parse if face.checks_body else parse_freely


def gist(read: Body, estimate: Estimator) -> tuple[str | None, bool, str | None, str, str, int]:
    """Its model, whether it streams, its session; the text of its tools; that of its prompt, and the prompt's tokens.
    (Of a chat all members at once: compiled, to ask a struct for one takes half as long.)"""
    if type(read) is not _chat:
        text, tokens = read.text(estimate)
        return read.model, bool(read.stream), read.session(), read.tools_text(), text, tokens
    model, stream, session, messages, prompt, given, tools = _astuple(read)
    texts: list[str] = []
    ids = 0 if messages is None else collect_chat(messages, texts)
    if prompt is not None:
        ids += collect(prompt, texts)
    if given is not None:
        ids += collect(given, texts)
    text, tokens = estimate(texts, ids)
    named = None if session is None else read.session()
    return model, stream is True, named, "" if tools is _no_tools else read.tools_text(), text, tokens


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
    return word(value) if isinstance(value, str) else value


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
    for name, value, kind, called in (("model", model, str, "string"), ("stream", stream, bool, "boolean")):
        if not isinstance(value, kind | None):
            raise BadRequest(f"{name!r} must be a {called}", param=name)


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
