"""Replays a trace of block names by arrival order: hits and balance, without a timing model of the engines.

The trace has one JSON object a line: `timestamp` (ms), `input_length`, `output_length` (tokens), `hash_ids` (names of
the 512-token blocks, equal names meaning equal beginnings), as Mooncake published theirs. Every instance keeps an LRU
cache of blocks; the index is told of what is sent and never of what is dropped. What the policies see as in flight: a
prompt leaves after the time it takes to compute its uncached tokens at 10,000 tokens/s behind what its instance still
has, a request 25 ms later for each token of its output.
"""

from __future__ import annotations

import heapq
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.routing.engine import TOKENS_PER_S, Change, Job
from benchmarks.routing.fleet import Router

BLOCK = 512
KV_TOKENS = 1_020_000
OUTPUT_TOKEN_S = 0.025
CHARS = 8
"""Characters of a block's text: its name in hex."""


@dataclass(frozen=True)
class Replayed:
    hit: float
    spread: float
    """Uncached tokens of the busiest instance, by the mean; over the whole trace."""


def load(path: Path) -> list[Job]:
    jobs = []
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            text = "".join(f"{name:0{CHARS}x}" for name in row["hash_ids"])
            jobs.append(
                Job(row["timestamp"] / 1000, row["input_length"], row["output_length"], tuple(row["hash_ids"]), text)
            )
    return jobs


def replay(jobs: list[Job], instances: int, router: Router) -> Replayed:
    """`router` was made with blocks of `CHARS` characters: one for each of the trace's."""
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(instances)]
    free_at = np.zeros(instances)
    work = np.zeros(instances)
    hits = total = 0
    leaving: list[tuple[float, int, bool, Job]] = []
    for number, job in enumerate(jobs):
        while leaving and leaving[0][0] <= job.at:
            at, _, ended, gone = heapq.heappop(leaving)
            router.see(Change(at, gone, ended))
        k = router.route(job, job.at)
        cache = caches[k]
        known = 0
        for block in job.blocks:
            if block not in cache:
                break
            known += 1
        cached = min(known * BLOCK, job.prompt)
        for block in reversed(job.blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > KV_TOKENS // BLOCK:
            cache.popitem(last=False)
        hits += cached
        total += job.prompt
        work[k] += job.prompt - cached
        free_at[k] = max(free_at[k], job.at) + (job.prompt - cached) / TOKENS_PER_S
        heapq.heappush(leaving, (free_at[k], 2 * number, False, job))
        heapq.heappush(leaving, (free_at[k] + job.output * OUTPUT_TOKEN_S, 2 * number + 1, True, job))
    return Replayed(hits / total, float(work.max() / work.mean()))
