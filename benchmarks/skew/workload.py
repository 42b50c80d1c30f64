"""The workload of `workload.yaml`, made from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from random import Random
from statistics import fmean, pvariance
from typing import Any

import yaml

from benchmarks.routing.engine import DECODING_S, STEP_S, TOKENS_PER_S

FILE = Path(__file__).with_name("workload.yaml")


@dataclass(slots=True)
class Request:
    """One request, and what became of it. Times in seconds."""

    number: int
    at: float
    host: int
    prompt: int
    """Tokens."""
    answer: int
    begun: float = field(default=-1.0, init=False)
    """When an instance took it."""
    first: float = field(default=-1.0, init=False)
    """When its first token was there."""
    ended: float = field(default=-1.0, init=False)
    stolen: bool = field(default=False, init=False)

    @property
    def ttft(self) -> float:
        return self.first - self.at

    @property
    def wait(self) -> float:
        return self.begun - self.at


@dataclass(frozen=True)
class Shape:
    load: float
    busy_share: float


@dataclass(frozen=True)
class Workload:
    hosts: int
    instances: int
    places: int
    sigma: float
    mean_prompt: int
    mean_answer: int
    requests: int
    seeds: tuple[int, ...]
    shapes: dict[str, Shape]

    @classmethod
    def load(cls, path: Path = FILE) -> Workload:
        tree: dict[str, Any] = yaml.safe_load(path.read_text())
        shapes = {name: Shape(**tree.pop(name)) for name in ("skewed", "even")}
        seeds = tuple(tree.pop("seeds"))
        return cls(**tree, seeds=seeds, shapes=shapes)

    @property
    def token_s(self) -> float:
        """One token of an answer, at an instance that is full."""
        return STEP_S + DECODING_S * self.places

    @property
    def servers(self) -> int:
        """Places of all hosts together."""
        return self.hosts * self.instances * self.places

    def service_s(self, prompt: float, answer: float) -> float:
        return prompt / TOKENS_PER_S + answer * self.token_s

    def make(self, shape: Shape, seed: int) -> list[Request]:
        """Arrivals are as frequent as the lengths drawn allow: means over a few thousand of them differ by several
        percent, and it is the load that is promised."""
        rng = Random(f"skew/{seed}")
        lengths = [
            (self._length(rng, self.mean_prompt), self._length(rng, self.mean_answer)) for _ in range(self.requests)
        ]
        rate = shape.load * self.servers / fmean(self.service_s(*each) for each in lengths)
        now, made = 0.0, []
        for number, (prompt, answer) in enumerate(lengths):
            now += rng.expovariate(rate)
            host = 0 if rng.random() < shape.busy_share else rng.randrange(1, self.hosts)
            made.append(Request(number, now, host, prompt, answer))
        return made

    def _length(self, rng: Random, mean: int) -> int:
        return max(1, round(rng.lognormvariate(log(mean) - self.sigma**2 / 2, self.sigma)))

    def mean_wait_s(self, load: float, requests: Sequence[Request]) -> float:
        """In one line for all places, in closed form: M/G/c by Allen and Cunneen, with the moments as drawn."""
        times = [self.service_s(request.prompt, request.answer) for request in requests]
        mean = fmean(times)
        spread = pvariance(times) / mean**2
        return _erlang_c(self.servers, load) * mean / (self.servers * (1 - load)) * (1 + spread) / 2


def _erlang_c(servers: int, load: float) -> float:
    """The share of arrivals that find all servers busy, if service times were exponential."""
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = load * servers * blocked / (k + load * servers * blocked)
    return blocked / (1 - load * (1 - blocked))
