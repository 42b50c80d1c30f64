"""The prefix index: what the scheduler can enter, what a look-up and a whole decision cost.

A decision is measured in units of the hashes of its blocks, timed in the same run: one xxh3 per block from Python (of
which the calls are the larger part), of blocks cut beforehand or on the way, and the product's own hash.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from random import Random

import numpy as np
import pytest
import xxhash
from pytest_benchmark.fixture import BenchmarkFixture

from broker.policies import Options, make_policy
from broker.policies.base import FEW, Vector
from broker.prefix import PREFIX, PrefixIndex, PrefixWriter, prefix_layout
from broker.prefix.keys import compiled, namespace, text_keys
from broker.route import RouteRequest
from broker.types import Trust
from broker.wire import RoutingNotices
from shm.hashtable import TableWriter
from shm.segment import Segment

BATCH = 256
PROMPT_CHARS = 32 * 1024
BLOCK = 64


class Loads:
    """Counters of `n` instances, as numpy vectors: the policy's own cost, without the view's."""

    def __init__(self, n: int) -> None:
        rng = np.random.default_rng(1)
        self.slots: Vector = np.arange(n, dtype=np.int64)
        self.listed = tuple(range(n))
        self.in_flight: Vector = rng.integers(0, 15, n)
        self.tokens: Vector = rng.integers(0, 20_000, n)
        self.waiting: Vector = np.zeros(n, dtype=np.int64)
        self.trust: Vector = np.full(n, int(Trust.EXACT), dtype=np.int64)
        self.load: Vector = self.in_flight
        self.requests = tuple(self.in_flight.tolist()) if n <= FEW else self.in_flight


def text(rng: Random, chars: int) -> str:
    return rng.randbytes(chars // 2).hex()


def best_us(call: Callable[[], object], rounds: int = 300) -> float:
    shortest = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest * 1e6


@pytest.mark.parametrize("kind", ["new", "known"])
def test_insert(benchmark: BenchmarkFixture, tmp_path: Path, kind: str) -> None:
    """Blocks/s of the scheduler's half, in batches of 256, with the default capacity: full, so that new ones evict."""
    writer = TableWriter(Segment.create(tmp_path / PREFIX, prefix_layout(1024, 1)))
    rng = np.random.default_rng(1)
    tick = 0

    def batches() -> tuple[tuple[list[Vector]], dict[str, object]]:
        keys = rng.integers(1, 2**62, size=(1024, BATCH), dtype=np.int64)
        return (list(keys),), {}

    def insert(keys: list[Vector]) -> None:
        nonlocal tick
        for batch in keys:
            tick += 1
            writer.add(batch, tick & 7, tick)

    for _ in range(6):
        (first,), _named = batches()
        insert(first)
    if kind == "new":
        benchmark.pedantic(insert, setup=batches, rounds=8)
    else:
        benchmark.pedantic(insert, args=(first,), rounds=8)
    benchmark.extra_info["blocks_per_s"] = round(1024 * BATCH / benchmark.stats.stats.min)


@pytest.mark.parametrize("known", [0, 512])
def test_a_notice_is_applied(benchmark: BenchmarkFixture, tmp_path: Path, known: int) -> None:
    """What the scheduler does for a prompt of 512 blocks: all new, or all known."""
    segment = Segment.create(tmp_path / PREFIX, prefix_layout(8, 1))
    writer = PrefixWriter(segment, dict.fromkeys(range(8), 1))
    rng = np.random.default_rng(1)
    notices = [
        RoutingNotices(0, 1, [1], [1], [512], rng.integers(1, 2**62, size=512, dtype=np.int64).tobytes())
        for _ in range(400)
    ]
    for notice in notices if known else ():
        writer.apply(notice)
    those = iter(notices)
    benchmark.pedantic(writer.apply, setup=lambda: ((next(those),), {}), rounds=len(notices))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[PrefixIndex, str]]:
    """By number of instances: an index with 2,000 other prompts, and a prompt of 32 KiB of which 3/4 are known."""
    made = {}
    for n in (8, 64, 1024):
        path = tmp_path_factory.mktemp(f"instances{n}")
        segment = Segment.create(path / PREFIX, prefix_layout(n, 1))
        writer = PrefixWriter(segment, dict.fromkeys(range(n), 1))
        index = PrefixIndex(segment, 0, block=BLOCK)
        rng = Random(1)
        head = text(rng, PROMPT_CHARS)
        prompts = [text(rng, 4096) for _ in range(2000)]
        prompts += [head[: PROMPT_CHARS // 8 * k] + text(rng, 1024) for k in range(1, 7) for _ in range(3)]
        for i, prompt in enumerate(prompts):
            index.note(RouteRequest(prompt=prompt), i % n)
            while notices := index.batch():
                writer.apply(notices)
        made[n] = index, head
    return made


def decisions(index: PrefixIndex, head: str, n: int, name: str = "prefix_cost") -> Callable[[], int]:
    """One decision after another, as the dispatcher has them made: choice, size of the lease, notice. Never the same
    prompt twice in turn, since keys of the last one are kept."""
    policy = make_policy(name, Options(balance_abs_threshold=math.inf), Random(1), 0.0, index)
    view = Loads(n)
    prompts = cycle([head, head[:-1] + "-"])

    def decide() -> int:
        index._outbox.clear()
        index._outbox_keys = 0
        index._pending.clear()
        request = RouteRequest(prompt=next(prompts), prompt_tokens=8192)
        slot = policy.pick(request, view)
        view.tokens[slot] += policy.tokens(request, slot)
        policy.placed(request, slot)
        view.tokens[slot] -= policy.tokens(request, slot)
        return slot

    return decide


@pytest.mark.parametrize("name", ["prefix_cost", "cache_aware"])
@pytest.mark.parametrize("n", [8, 64, 1024])
def test_decision(benchmark: BenchmarkFixture, filled: dict[int, tuple[PrefixIndex, str]], n: int, name: str) -> None:
    """A prompt of 32 KiB in 512 blocks, from text to slot, its notice included: at most four times the xxh3 of its
    blocks, where there is a compiler."""
    index, prompt = filled[n]
    decide = decisions(index, prompt, n, name)
    benchmark(decide)
    start = namespace("", BLOCK, "text")
    data = prompt.encode()
    pieces = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    of_pieces = best_us(lambda: [xxhash.xxh3_64_intdigest(piece) for piece in pieces])
    cutting = best_us(lambda: [xxhash.xxh3_64_intdigest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)])
    own = best_us(lambda: text_keys(prompt, BLOCK, start))
    decision = best_us(decide, 2000)
    benchmark.extra_info.update(
        decision_us=round(decision, 1),
        xxh3_us=round(of_pieces, 1),
        xxh3_and_cutting_us=round(cutting, 1),
        own_hash_us=round(own, 1),
        by_xxh3=round(decision / of_pieces, 2),
        by_xxh3_and_cutting=round(decision / cutting, 2),
        by_own_hash=round(decision / own, 2),
    )
    assert compiled is None or decision <= 4 * of_pieces


def test_decision_grows_little_with_the_fleet(filled: dict[int, tuple[PrefixIndex, str]]) -> None:
    """1,024 instances cost at most twice what 8 do, whatever the machine."""
    times = {n: best_us(decisions(*filled[n], n), 1000) for n in (8, 1024)}
    assert times[1024] <= 2 * times[8], times
