"""The simulated engine behind both shells: requests in, the model's steps in real time, answers out, a ledger.

shell -- submit(request, out) --> job         the model decides when, `text` what
shell <-- out.emit / finish / fail -- step    all answers of a step, then `on_step`
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
import orjson

from broker.worker.answer import Answer, Finish, FinishReason
from broker.worker.link import Load
from broker.worker.request import EngineError, Request
from broker.worker.sim.faults import Faults
from broker.worker.sim.kv import Event
from broker.worker.sim.model import Model, Speeds, Step, TooLong
from broker.worker.sim.text import Kind, Prompt, Words, prompt_of

CREATED = 1_700_000_000
"""`created` of every answer: the bytes must not depend on the clock."""
EXIT_DIED = 70
"""Exit status of a death on purpose."""
DYING_S = 0.1
"""Before a death what was handed to ZMQ gets this long to leave; else "after n tokens" would mean any number below."""
LEDGER_LENGTH = 100_000
EVENTS_KEPT = 10_000
MAX_WAITING = 4096

KINDS: dict[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/embeddings": "embedding",
}


class Out(Protocol):
    """Where an answer goes. Never called before `submit` has returned."""

    def emit(self, data: bytes) -> None: ...

    def finish(self, data: bytes) -> None: ...

    def fail(self, error: EngineError) -> None: ...


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """What disaggregation adds to one request; see pd.py."""

    data: bytes = b""
    """Seeds the words, beside prompt and name."""
    extra: Mapping[str, Any] = {}
    """Added to the answer."""
    prefill_only: bool = False
    """One token, whatever the request asks for."""
    on_prefilled: Callable[[], None] | None = None


class Entry(msgspec.Struct):
    """A request in the ledger."""

    id: str
    path: str
    state: str = "open"
    """open, finished, aborted, failed."""
    tokens: int = 0
    """Produced and sent."""
    bytes: int = 0
    """Of the answer's body, as handed to the transport."""


class Job:
    """One request under way."""

    def __init__(self, number: int, entry: Entry, out: Out, words: Words, length: int, finish: Finish) -> None:
        self.number = number
        self.entry = entry
        self.out = out
        self.words = words
        self.length = length
        self.finish = finish
        self.answer: Answer | Embedding
        self.on_prefilled: Callable[[], None] | None = None
        self.hung = False
        self.cached = 0


class Embedding:
    """The answer to `/v1/embeddings`: for each input eight numbers, drawn from the words' source."""

    def __init__(self, body: Mapping[str, Any], words: Words) -> None:
        self._model = body.get("model", "")
        inputs = body.get("input")
        self._inputs = len(inputs) if isinstance(inputs, list) and isinstance(inputs[0], str) else 1
        self._words = words

    def text(self, delta: str) -> bytes:
        return b""

    def end(self, finish: Finish) -> bytes:
        data = [{"object": "embedding", "index": i, "embedding": self._vector(i)} for i in range(self._inputs)]
        return orjson.dumps({"object": "list", "data": data, "model": self._model, "usage": finish.usage()})

    def _vector(self, i: int) -> list[float]:
        return [byte / 255 for byte in self._words.delta(i).encode().ljust(8, b"\0")[:8]]


class SimulatedEngine:
    """Owner of the model, the faults and the ledger. `run` is its loop; one task of the shell."""

    def __init__(
        self,
        name: str,
        *,
        models: tuple[str, ...] = (),
        speeds: Speeds | None = None,
        speed: float = 1.0,
        faults: Faults | None = None,
        seed: int = 0,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        """`speed`: how many times faster than real the model's time runs. `on_step`: called after each
        step's answers."""
        self.name = name
        self.models = models
        self.model = Model(speeds or Speeds())
        self.faults = faults or Faults()
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.ledger: deque[Entry] = deque(maxlen=LEDGER_LENGTH)
        self.on_step = on_step
        self.on_faults: Callable[[], None] | None = None
        """Called after the faults were changed."""
        self._speed = speed
        self._rng = random.Random(seed)
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._hung = 0
        self._work = asyncio.Event()

    def load(self) -> Load:
        model = self.model
        return Load(model.running + self._hung, model.waiting, model.waiting_tokens, model.kv_permille)

    @property
    def is_idle(self) -> bool:
        return not self._jobs

    def admit(self, request: Request) -> Prompt:
        """The request's prompt, if it may run. Raises `EngineError`: on purpose, or because it cannot be answered."""
        self.faults.admit(self._rng)
        kind = KINDS.get(request.path.partition("?")[0])
        if kind is None:
            raise EngineError(404, f"no such path: {request.path}")
        asked = request.body.get("model")
        if self.models and asked is not None and asked not in self.models:
            raise EngineError(404, f"The model `{asked}` does not exist.", "NotFoundError")
        if request.body.get("n", 1) not in (1, None):
            raise EngineError(400, "n must be 1")
        if self.model.waiting >= MAX_WAITING:
            raise EngineError(429, "too many requests are waiting", "overloaded_error")
        return prompt_of(kind, request.body)

    def submit(self, request: Request, prompt: Prompt, out: Out, transfer: Transfer | None = None) -> Job:
        """Queues an admitted request. Raises `EngineError`."""
        transfer = transfer or Transfer()
        body = request.body
        words = Words(prompt.digest, self.name, transfer.data)
        length, reason = _length(body, words)
        if transfer.prefill_only or prompt.kind == "embedding":
            length = 1
        number = next(self._numbers)
        finish = Finish(reason=reason, prompt_tokens=len(prompt.tokens), completion_tokens=length, extra=transfer.extra)
        entry = Entry(request.headers.get("x-request-id", request.id), request.path)
        job = Job(number, entry, out, words, length, finish)
        job.on_prefilled = transfer.on_prefilled
        if prompt.kind == "embedding":
            job.answer = Embedding(body, words)
        else:
            job.answer = Answer(
                request.path,
                body,
                stream=request.stream,
                id=answer_id(prompt.digest, self.name),
                created=CREATED,
                fingerprint=self.name,
            )
        # Output tokens need ids of their own only for the cache, where a repeated answer must hash alike.
        try:
            self.model.submit(number, prompt.tokens, _output_ids(words, length), time.monotonic())
        except TooLong as e:
            raise EngineError(400, str(e)) from e
        self._jobs[number] = job
        self.ledger.append(entry)
        self._work.set()
        return job

    def set_faults(self, faults: Faults) -> None:
        self.faults = faults
        if self.on_faults is not None:
            self.on_faults()

    def abort(self, job: Job) -> None:
        """The client is gone; does nothing once the answer has ended."""
        if self._end(job, "aborted"):
            self.model.abort(job.number)

    async def run(self) -> None:
        """Takes steps for ever, each at its time; when late it catches up, but never more than a tenth of a second."""
        due = time.monotonic()
        while True:
            step = self.model.step(time.monotonic())
            if step is None:
                self._work.clear()
                await self._work.wait()
                due = time.monotonic()
                continue
            for number, cached in step.admitted.items():
                self._jobs[number].cached = cached
            due = max(due, time.monotonic() - 0.1) + (step.ends - step.begins) * self.faults.slow / self._speed
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._deliver(step)

    def _deliver(self, step: Step) -> None:
        self.events.extend(step.events)
        finished = set(step.finished)
        for number in step.produced:
            job = self._jobs.get(number)
            if job is not None and not job.hung:
                self._advance(job, number in finished)
        if self.on_step is not None:
            self.on_step()

    def _advance(self, job: Job, last: bool) -> None:
        entry, faults = job.entry, self.faults
        if faults.die_after is not None and entry.tokens >= faults.die_after:
            time.sleep(DYING_S)
            os._exit(EXIT_DIED)
        if faults.hang_after is not None and entry.tokens >= faults.hang_after:
            job.hung = True
            self._hung += 1
            self.model.abort(job.number)  # counted by hand from now on, as it will never end
            return
        if job.on_prefilled is not None and entry.tokens == 0:
            job.on_prefilled()
        data = job.answer.text(job.words.delta(entry.tokens))
        entry.tokens += 1
        if not last:
            entry.bytes += len(data)
            if data:
                job.out.emit(data)
            return
        data += job.answer.end(msgspec.structs.replace(job.finish, cached_tokens=job.cached))
        entry.bytes += len(data)
        self._end(job, "finished")
        job.out.finish(data)

    def _end(self, job: Job, state: str) -> bool:
        if self._jobs.pop(job.number, None) is None:
            return False
        job.entry.state = state
        if job.hung:
            self._hung -= 1
        return True


def answer_id(digest: bytes, name: str) -> str:
    """The id in an answer: as little a matter of chance as its words."""
    return Words(digest, name, b"id").text(6).replace(" ", "")


def _length(body: Mapping[str, Any], words: Words) -> tuple[int, FinishReason]:
    """Tokens to produce, and what stops them."""
    limit = body.get("max_completion_tokens")
    if limit is None:
        limit = body.get("max_tokens")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise EngineError(400, "max_tokens must be a positive integer")
    own = words.own_length
    least = body.get("min_tokens")
    if type(least) is int:
        own = max(own, least)
    if limit is not None and (body.get("ignore_eos") is True or limit < own):
        return limit, "length"
    return own, "stop"


def _output_ids(words: Words, length: int) -> range:
    """Token ids of the output: a run that begins where this text's hash says."""
    first = words.own_length * 1_000_003 % 2**31
    return range(first, first + length)
