"""FastDeploy's tokenizer service: prompts are cut into blocks of its tokens, for policies that look prompts up.

    POST {"text": T, "prompt": T, "message": T} -> {"input_ids": [...]}

A request is held until the answer is there, and no longer than the time limit; nothing else waits for it. Without an
answer its prompt is cut by characters.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from broker import addresses
from broker.config import Config
from broker.errors import UNDECODABLE, PenstockError
from broker.policies import TOKENIZED, in_use
from broker.types import Instance
from frontend.upstream.base import Call, Headers, Sink, Upstream, UpstreamRequest

logger = logging.getLogger("frontend")

REMEMBERED = 256
"""Prompts whose tokens are kept; the one that was not asked for the longest time goes first."""
MAX_ANSWER = 16 * 1024 * 1024

Ids = Sequence[int]


class _Answer(msgspec.Struct):
    input_ids: list[int]


_decoder = msgspec.json.Decoder(_Answer)


class Tokenizer:
    """Asks over the frontend's own transport. Owned by the frontend's process; everything on its loop's thread."""

    def __init__(self, url: str, timeout_s: float, upstream: Upstream, loop: asyncio.AbstractEventLoop) -> None:
        """`url` as FastDeploy has it: the scheme and the path `/tokenize` may be missing."""
        origin, target = addresses.service(url)
        path, mark, query = target.partition("?")
        self._path = (path if path.strip("/") else "/tokenize") + mark + query
        self._service = Instance(url=origin)
        self._timeout_s = timeout_s
        self._upstream = upstream
        self._loop = loop
        self._known: OrderedDict[bytes, Ids] = OrderedDict()

    @classmethod
    def wanted(cls, config: Config, upstream: Upstream, loop: asyncio.AbstractEventLoop) -> Tokenizer | None:
        """None where there is none, or no policy in use would look at its tokens."""
        settings = config.scheduler
        if not settings.tokenizer_url or TOKENIZED.isdisjoint(in_use(config).values()):
            return None
        return cls(settings.tokenizer_url, settings.tokenizer_timeout_secs, upstream, loop)

    def known(self, text: str) -> Ids | None:
        """The text's tokens, if they have been asked for lately."""
        ids = self._known.get(key := _digest(text))
        if ids is not None:
            self._known.move_to_end(key)
        return ids

    def ask(self, text: str, hear: Callable[[Ids], None]) -> Question:
        """`hear` is called once, never before this returns, with no ids if there is no answer."""

        def answered(ids: Ids) -> None:
            if ids:
                self._known[_digest(text)] = ids
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            hear(ids)

        body = msgspec.json.encode({"text": (said := _encodable(text)), "prompt": said, "message": said})
        request = UpstreamRequest(path=self._path, headers=[(b"content-type", b"application/json")], body=body)
        question = Question(answered)
        question.open(lambda sink: self._upstream.open(self._service, request, sink), self._timeout_s, self._loop)
        return question


class Question(Sink):
    """One prompt at the service: the sink of its answer, and the place of the request that waits for it."""

    def __init__(self, hear: Callable[[Ids], None]) -> None:
        self._hear = hear
        self._call: Call | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._status = 0
        self._parts: list[bytes] = []
        self._size = 0

    def open(self, send: Callable[[Sink], Call], timeout_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(timeout_s, partial(self._give_up, f"no answer within {timeout_s:g} s"))
        self._call = send(self)

    def leave(self) -> None:
        """The request is no more. Idempotent."""
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        call, self._call = self._call, None
        if call is not None:
            call.cancel()

    def start(self, status: int, headers: Headers) -> None:
        self._status = status

    def write(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > MAX_ANSWER:
            self._give_up(f"its answer is larger than {MAX_ANSWER} bytes")
        else:
            self._parts.append(data)

    def finish(self) -> None:
        if self._status >= 300:
            self._give_up(f"it answers {self._status}")
            return
        try:
            ids = array("q", _decoder.decode(b"".join(self._parts)).input_ids)
        except (*UNDECODABLE, OverflowError) as error:
            self._give_up(f"its answer has no input_ids: {error}")
            return
        if not ids:
            self._give_up("its answer is empty")
            return
        self.leave()
        self._hear(ids)

    def fail(self, error: PenstockError) -> None:
        self._give_up(error.message)

    def _give_up(self, reason: str) -> None:
        self.leave()
        logger.warning("cache-aware prefill: tokenizer failed, fallback to char tokens: %s", reason)
        self._hear(())


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _encodable(text: str) -> str:
    """Half an emoji is no JSON; a replacement character is as good a token."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
