"""The members of a request's body that matter, as msgspec reads them, and what is in them.

None of it is compiled, as msgspec's structs are; of a chat like nearly all `frontend/body.py` looks for itself.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from broker.faces import PENSTOCK, Estimate
from frontend.texts import collect, collect_chat

Estimator = Callable[[list[str], int], Estimate]

NO_TOOLS = msgspec.Raw()

_BYTES_PER_TOKEN = 4


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
    tools: msgspec.Raw = NO_TOOLS
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
        if self.tools is NO_TOOLS:  # of nearly all
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
        return word(self.session_id) or word(extra.get("session_id")) or None

    def tags(self) -> tuple[tuple[str, str], ...]:
        return ("req_id", word(self.req_id)), ("session_id", self.session() or "")


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


def word(value: object) -> str:
    """Its text, as UTF-8 can have it; nothing, if it is none."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else ""
