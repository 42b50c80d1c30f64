"""OpenAI's answers out of text deltas: SSE events while streaming, one JSON object otherwise.

One `Answer` per request: `text(delta)` for each piece of text, `end(finish)` once. Both give the bytes that are
ready for the client now, possibly none (an unstreamed answer is all in `end`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]

DONE_EVENT = b"data: [DONE]\n\n"


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer ended. An author's generator may yield it last; otherwise the reason is "stop"."""

    reason: FinishReason = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    extra: Mapping[str, Any] = {}
    """Top-level keys added to the answer (to the last chunk of a stream), such as `kv_transfer_params`."""

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answer:
    """Formats one answer; what it needs to know of the request is given here, once."""

    def __init__(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        stream: bool,
        id: str,
        created: int,
        fingerprint: str | None = None,
    ) -> None:
        self._chat = path.partition("?")[0].endswith("/chat/completions")
        self._stream = stream
        options = body.get("stream_options")
        self._include_usage = isinstance(options, dict) and options.get("include_usage") is True
        self._parts: list[str] = []
        self._begun = False
        model = body.get("model")
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{id}",
            "object": self._object(),
            "created": created,
            "model": model if isinstance(model, str) else "",
            "system_fingerprint": fingerprint,
        }
        # An event is prefix + JSON string + suffix: the hot path encodes the delta's text and nothing else.
        event = b"data: " + msgspec.json.encode(self._head)[:-1] + b',"choices":[{"index":0,'
        if self._chat:
            self._before, self._after = event + b'"delta":{"content":', b'},"finish_reason":null}]}\n\n'
        else:
            self._before, self._after = event + b'"text":', b',"logprobs":null,"finish_reason":null}]}\n\n'

    def text(self, delta: str) -> bytes:
        if not self._stream:
            self._parts.append(delta)
            return b""
        return self._opening() + self._before + msgspec.json.encode(delta) + self._after

    def end(self, finish: Finish) -> bytes:
        if not self._stream:
            return msgspec.json.encode(
                {**self._head, "choices": [self._whole(finish)], "usage": finish.usage(), **finish.extra}
            )
        last = {"index": 0, "delta": {}} if self._chat else {"index": 0, "text": "", "logprobs": None}
        out = self._opening() + _event(
            {**self._head, "choices": [{**last, "finish_reason": finish.reason}], **finish.extra}
        )
        if self._include_usage:
            out += _event({**self._head, "choices": [], "usage": finish.usage()})
        return out + DONE_EVENT

    def _opening(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        if not self._chat:
            return b""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return _event({**self._head, "choices": [choice]})

    def _whole(self, finish: Finish) -> dict[str, Any]:
        text = "".join(self._parts)
        if self._chat:
            message = {"role": "assistant", "content": text}
            return {"index": 0, "message": message, "logprobs": None, "finish_reason": finish.reason}
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish.reason}

    def _object(self) -> str:
        if not self._chat:
            return "text_completion"
        return "chat.completion.chunk" if self._stream else "chat.completion"


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
