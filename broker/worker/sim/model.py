"""The timing model of an engine: continuous batching over a finite KV cache. Pure; time comes in and goes out.

One step, as real engines take it:

1. Waiting requests are admitted in order while the batch and the cache have room for the *whole* of the first one
   (prompt and output: so nothing is ever preempted). Nobody overtakes.
2. Prompts that are not computed yet share `prefill_chunk` tokens, oldest first. Cached prefix blocks cost nothing;
   the last prompt token is always computed.
3. Every sequence whose prompt is computed produces one token.
4. The step takes `step_s` + `sequence_s` per decoding sequence + prompt tokens / `prefill_tokens_per_s`; its tokens
   are there at its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from broker.worker.sim.kv import Cache, Chain, Event, Holding


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Defaults are those of a mid-sized GPU."""

    batch: int = 128
    """Sequences that run at once."""
    prefill_tokens_per_s: float = 10_000.0
    prefill_chunk: int = 2048
    step_s: float = 0.012
    sequence_s: float = 0.00015
    kv_blocks: int = 16_384
    block_size: int = 16


class TooLong(ValueError):
    """Prompt and output would not fit the cache even if it were empty."""


@dataclass(eq=False)
class Entry:
    """One request in the model."""

    id: int
    prompt: Sequence[int]
    output: Sequence[int]
    """The tokens it is going to produce, at least one."""
    arrived: float
    chain: Chain
    holding: Holding | None = None
    computed: int = 0
    """Prompt tokens computed or taken from the cache."""
    cached: int = 0
    """Prompt tokens taken from the cache."""
    produced: int = 0

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)


@dataclass(frozen=True)
class Step:
    """What one step did; true at `ends`."""

    begins: float
    ends: float
    produced: list[int]
    """Ids of the sequences that produced a token, in order of admission."""
    finished: list[int]
    """Those of them whose token was the last."""
    admitted: dict[int, int]
    """Ids taken out of the queue, in its order, with the prompt tokens that each found in the cache."""
    events: list[Event] = field(default_factory=list)


class Model:
    """One engine. Its owner calls `step` again at the end of the last one."""

    def __init__(self, speeds: Speeds) -> None:
        self.speeds = speeds
        self.cache = Cache(speeds.kv_blocks, speeds.block_size)
        self._waiting: OrderedDict[int, Entry] = OrderedDict()
        self._running: OrderedDict[int, Entry] = OrderedDict()
        self._waiting_tokens = 0
        self.prompt_tokens = 0
        """Prompt tokens of all admitted so far; `cached_tokens` of them came from the cache."""
        self.cached_tokens = 0

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of the requests that wait."""
        return self._waiting_tokens

    @property
    def kv_permille(self) -> int:
        return 1000 * self.cache.used // self.cache.capacity

    def submit(self, id: int, prompt: Sequence[int], output: Sequence[int], now: float) -> None:
        """Queues a request. Raises `TooLong`."""
        if not output:
            raise ValueError("a sequence produces at least one token")
        sequence = Entry(id, prompt, output, now, Chain(self.speeds.block_size))
        if self._blocks(sequence.length) > self.cache.capacity:
            raise TooLong(f"{sequence.length} tokens do not fit {self.cache.capacity} blocks")
        self._waiting[id] = sequence
        self._waiting_tokens += len(prompt)

    def abort(self, id: int) -> None:
        """Forgets a request, wherever it is; unknown ids are ignored."""
        if (waiting := self._waiting.pop(id, None)) is not None:
            self._waiting_tokens -= len(waiting.prompt)
        elif (running := self._running.pop(id, None)) is not None:
            self._release(running)

    def step(self, now: float) -> Step | None:
        """One step that begins now; None when there is nothing to do."""
        admitted = self._admit()
        if not self._running:
            return None
        prefilled = self._prefill()
        decoding = [s for s in self._running.values() if s.computed == len(s.prompt)]
        finished = []
        for sequence in decoding:
            sequence.produced += 1
            if sequence.produced == len(sequence.output):
                finished.append(sequence.id)
            self._store(sequence)
        for id in finished:
            self._release(self._running.pop(id))
        speeds = self.speeds
        seconds = speeds.step_s + speeds.sequence_s * len(decoding) + prefilled / speeds.prefill_tokens_per_s
        events, self.cache.events = self.cache.events, []
        return Step(now, now + seconds, [s.id for s in decoding], finished, admitted, events)

    def _admit(self) -> dict[int, int]:
        admitted = {}
        while self._waiting and len(self._running) < self.speeds.batch:
            sequence = next(iter(self._waiting.values()))
            reusable = (len(sequence.prompt) - 1) // self.speeds.block_size
            sequence.chain.extend(sequence.prompt, reusable)
            holding = self.cache.reserve(sequence.chain.hashes[:reusable], self._blocks(sequence.length))
            if holding is None:
                break
            del self._waiting[sequence.id]
            self._waiting_tokens -= len(sequence.prompt)
            sequence.holding = holding
            sequence.cached = sequence.computed = len(holding.pinned) * self.speeds.block_size
            self._running[sequence.id] = sequence
            self.prompt_tokens += len(sequence.prompt)
            self.cached_tokens += sequence.cached
            admitted[sequence.id] = sequence.cached
        return admitted

    def _prefill(self) -> int:
        left = self.speeds.prefill_chunk
        for sequence in self._running.values():
            chunk = min(left, len(sequence.prompt) - sequence.computed)
            if chunk:
                sequence.computed += chunk
                left -= chunk
                self._store(sequence)
            if not left:
                break
        return self.speeds.prefill_chunk - left

    def _store(self, sequence: Entry) -> None:
        """Full blocks become known to the cache. A token's own KV is computed when the next one is produced."""
        holding = sequence.holding
        assert holding is not None
        filled = sequence.computed + max(0, sequence.produced - 1)
        blocks = filled // self.speeds.block_size
        if blocks > len(holding.pinned):
            tokens = [*sequence.prompt, *sequence.output[: sequence.produced]]
            sequence.chain.extend(tokens, blocks)
            self.cache.store(holding, sequence.chain.hashes, tokens, blocks)

    def _release(self, sequence: Entry) -> None:
        if sequence.holding is not None:
            self.cache.release(sequence.holding)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.speeds.block_size)
