"""A request as an engine sees it, and the error an engine may answer with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

Body = dict[str, Any]
"""A parsed JSON object from a client."""


class EngineError(Exception):
    """Raised by an author's generator: the request ends with this HTTP status and an OpenAI error body."""

    def __init__(self, status: int, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or ("invalid_request_error" if 400 <= status < 500 else "engine_error")

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.kind, "param": None, "code": self.status}
        return msgspec.json.encode({"error": error})


class Request:
    """One request. Immutable; the body is parsed when it is first looked at."""

    __slots__ = ("_body", "headers", "id", "path", "raw", "stream", "transfer")

    def __init__(
        self, id: str, path: str, raw: bytes, *, stream: bool, headers: Mapping[str, str], transfer: bytes = b""
    ) -> None:
        self.id = id
        """Unique within the engine's life; good for logs."""
        self.path = path
        self.raw = raw
        """The body, byte for byte as the client sent it."""
        self.stream = stream
        self.headers = headers
        """Names in lower case."""
        self.transfer = transfer
        """Transfer metadata of the peer instance in prefill/decode pairs."""
        self._body: Body | None = None

    @property
    def body(self) -> Body:
        """The body as JSON. Raises `EngineError` 400 when it is not an object."""
        if self._body is None:
            self._body = parse_body(self.raw)
        return self._body

    @property
    def prompt(self) -> str:
        """The prompt's text: the contents of the messages, or `prompt`; token-id prompts give nothing."""
        messages = self.body.get("messages")
        if isinstance(messages, list):
            return "\n".join(_text(m.get("content")) for m in messages if isinstance(m, dict))
        return _text(self.body.get("prompt"))

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.path} stream={self.stream} {len(self.raw)} bytes>"


def parse_body(raw: bytes) -> Body:
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
        raise EngineError(400, f"the body is not JSON: {e}") from e
    if not isinstance(body, dict):
        raise EngineError(400, "the body must be a JSON object")
    return body


def _text(content: object) -> str:
    """A string, or the texts in a list of content parts or of strings."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [p.get("text", "") if isinstance(p, dict) else p for p in content]
        return "\n".join(p for p in parts if isinstance(p, str))
    return ""
