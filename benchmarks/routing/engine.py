"""A model of one inference engine, in virtual time: what a routing decision costs its request and those behind it.

Continuous batching with a FIFO queue. A step takes 12 ms, 0.15 ms for each decoding request, and its prompt chunk of at
most 2,048 tokens at 10,000 tokens/s; prompts are computed one after the other. Requests that run at once are limited,
and so is the KV cache: blocks of 256 tokens, found again by the chain of all blocks before them, the least recently
used dropped first, prompt and whole output reserved when the prompt's turn comes. The last prompt token is always
computed.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field

STEP_S = 0.012
DECODING_S = 0.00015
CHUNK = 2048
TOKENS_PER_S = 10_000.0
BLOCK = 256


@dataclass(slots=True)
class Job:
    """One request, and what became of it."""

    at: float
    prompt: int
    """Tokens."""
    output: int
    blocks: tuple[int, ...]
    """Names of the prompt's full blocks; equal names mean equal beginnings of prompts."""
    text: str
    engine: int = -1
    cached: int = 0
    """Prompt tokens found in the cache."""
    first_token_at: float = -1.0
    charged: int = 0
    """Prompt tokens that the router counts at the engine, until the first token or the end."""
    left: int = field(default=0, repr=False)


@dataclass(slots=True)
class Change:
    """What the router sees of an engine: an answer began, or ended."""

    at: float
    job: Job
    ended: bool


class Engine:
    def __init__(self, kv_tokens: int, running: int = 128) -> None:
        self._capacity = kv_tokens // BLOCK
        self._most = running
        self._queue: deque[Job] = deque()
        self._now = 0.0
        self._step_end: float | None = None
        self._chunk = 0
        self._prompt: Job | None = None
        self._steps = 0
        self._decoding: list[tuple[int, int, Job]] = []
        self._serial = 0
        self._pins: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._private = 0
        self.prompt_busy_s = 0.0
        """Time in which a prompt was computed or waited."""
        self.slots_busy_s = 0.0
        """Integral of running requests over time."""

    def put(self, job: Job) -> None:
        """`job` arrives now, at the time that `advance` was last called with."""
        self._queue.append(job)

    @property
    def is_idle(self) -> bool:
        return not (self._queue or self._prompt or self._decoding)

    def advance(self, until: float) -> list[Change]:
        """Runs up to `until`; a step that ends later goes on."""
        changes: list[Change] = []
        while True:
            if self._step_end is None:
                if self.is_idle:
                    self._now = max(self._now, until)
                    return changes
                self._begin(until)
            assert self._step_end is not None
            if self._step_end > until:
                return changes
            self._end(changes)

    def _begin(self, until: float) -> None:
        if self._prompt is None and self._queue and len(self._decoding) < self._most:
            self._admit()
        decoding = len(self._decoding)
        step = STEP_S + DECODING_S * decoding
        steps = 1
        if self._prompt is not None:
            self._chunk = min(CHUNK, self._prompt.left)
            step += self._chunk / TOKENS_PER_S
        elif decoding:  # nothing changes until an answer ends or a request arrives: many steps at once
            steps = max(1, int(min(self._decoding[0][0] - self._steps, (until - self._now) / step)))
        if self._prompt is not None or self._queue:
            self.prompt_busy_s += step * steps
        self.slots_busy_s += step * steps * (decoding + (self._prompt is not None))
        self._steps += steps
        self._step_end = self._now + step * steps

    def _end(self, changes: list[Change]) -> None:
        assert self._step_end is not None
        self._now = self._step_end
        self._step_end = None
        while self._decoding and self._decoding[0][0] <= self._steps:
            job = heapq.heappop(self._decoding)[2]
            self._release(job)
            changes.append(Change(self._now, job, ended=True))
        job_ = self._prompt
        if job_ is not None:
            job_.left -= self._chunk
            if job_.left == 0:
                job_.first_token_at = self._now
                self._prompt = None
                changes.append(Change(self._now, job_, ended=False))
                if job_.output > 1:
                    self._serial += 1
                    heapq.heappush(self._decoding, (self._steps + job_.output - 1, self._serial, job_))
                else:
                    self._release(job_)
                    changes.append(Change(self._now, job_, ended=True))

    def _admit(self) -> None:
        """The first in the queue begins, if the cache has room for it."""
        job = self._queue[0]
        known = 0
        for block in job.blocks:
            if block not in self._pins:
                break
            known += 1
        private = self._private_blocks(job)
        need = len(job.blocks) - known + private
        idle = self._idle
        pins = self._pins
        for block in job.blocks[:known]:
            if pins[block] == 0:
                del idle[block]
            pins[block] += 1
        excess = len(pins) + self._private + need - self._capacity
        if excess > len(idle):
            for block in reversed(job.blocks[:known]):
                self._unpin(block)
            if not self._decoding:
                raise ValueError(f"a request of {job.prompt} + {job.output} tokens never fits {self._capacity} blocks")
            return
        for _ in range(max(0, excess)):
            del pins[idle.popitem(last=False)[0]]
        for block in job.blocks[known:]:
            if pins.get(block) == 0:  # known behind a hole
                del idle[block]
            pins[block] = pins.get(block, 0) + 1
        self._private += private
        job.cached = min(known * BLOCK, job.prompt - 1)
        job.left = job.prompt - job.cached
        self._queue.popleft()
        self._prompt = job

    def _release(self, job: Job) -> None:
        self._private -= self._private_blocks(job)
        for block in reversed(job.blocks):  # so that ends go before beginnings
            self._unpin(block)

    def _unpin(self, block: int) -> None:
        self._pins[block] -= 1
        if self._pins[block] == 0:
            self._idle[block] = None

    @staticmethod
    def _private_blocks(job: Job) -> int:
        return -(-(job.prompt + job.output) // BLOCK) - len(job.blocks)
