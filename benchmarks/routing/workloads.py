"""Five kinds of load, made from a seed. Nothing in here is taken from a trace; the shapes are.

Texts carry one word of 4 characters for 16 tokens, so a block of 64 characters is the engine's block of 256 tokens, and
whoever compares characters, blocks or tokens sees the same sharing. A fifth of the requests warms up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import exp, log
from random import Random

from benchmarks.routing.engine import BLOCK, Job

CHARS = 64
"""Characters of an engine's block."""
PER_CHAR = BLOCK // CHARS


@dataclass(frozen=True)
class Workload:
    name: str
    kv_tokens: int
    running: int
    rates: tuple[float, float]
    """Requests/s at which eight engines are busy to about 70 and 90 % under the best peer: the share of time in which a
    prompt is computed or waits, for `heavy` 11 and 14 of the 16 slots. Found by trying, three seeds each."""
    make: Callable[[Random, float], list[Job]]


class _Texts:
    """Makes texts, and names their blocks."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._names: dict[tuple[int, str], int] = {}

    def fresh(self, tokens: int) -> str:
        chars = max(4, round(tokens / PER_CHAR / 4) * 4)
        return self._rng.randbytes(chars // 2).hex()[:chars]

    def job(self, at: float, text: str, output: int) -> Job:
        names, chain, above = self._names, [], 0
        for start in range(0, len(text) - CHARS + 1, CHARS):
            key = (above, text[start : start + CHARS])
            above = names.setdefault(key, len(names) + 1)
            chain.append(above)
        return Job(at, len(text) * PER_CHAR, max(1, output), tuple(chain), text)


def _arrivals(rng: Random, rate: float, count: int) -> Iterable[float]:
    now = 0.0
    for _ in range(count):
        now += rng.expovariate(rate)
        yield now


def synth(rng: Random, rate: float) -> list[Job]:
    """Long documents, each asked about several times while others are: like Mooncake's synthetic trace.

    Prompts p50 12,000, p95 45,000 tokens, outputs p50 70, p95 500; 0.75 to 0.8 of the prompt tokens can hit.
    """
    texts = _Texts(rng)
    jobs = []
    documents: list[str] = []
    left: list[int] = []
    for at in _arrivals(rng, rate, 1400):
        if not documents or rng.random() < 0.19:
            length = min(110_000.0, rng.lognormvariate(log(11_500), 0.85))
            documents.append(texts.fresh(round(length)))
            left.append(1 + int(rng.expovariate(1 / 4.8)))
        which = int(rng.random() ** 1.3 * len(documents))
        question = texts.fresh(round(rng.lognormvariate(log(300), 0.9)))
        answer = min(2000, round(rng.lognormvariate(log(70), 1.2)))
        jobs.append(texts.job(at, documents[which] + question, answer))
        left[which] -= 1
        if not left[which]:
            del documents[which], left[which]
    return jobs


def conv(rng: Random, rate: float) -> list[Job]:
    """Conversations that grow turn by turn and all begin with the same 512 tokens: like Mooncake's conversation trace.

    Prompts p50 7,000, p95 40,000 tokens, outputs p50 350; 0.24 to 0.28 of the prompt tokens can hit.
    """
    texts = _Texts(rng)
    head = texts.fresh(512)
    jobs = []
    going: list[tuple[float, str]] = []
    for at in _arrivals(rng, rate, 1500):
        output = min(2000, round(rng.lognormvariate(log(350), 0.6)))
        ready = [i for i, (when, _) in enumerate(going) if when <= at]
        if ready and rng.random() < 0.27:
            text = going.pop(ready[int(rng.random() * len(ready))])[1]
            text += texts.fresh(round(rng.lognormvariate(log(900), 1.0)))
        else:
            text = head + texts.fresh(min(100_000, round(rng.lognormvariate(log(6_000), 1.15))))
        jobs.append(texts.job(at, text, output))
        if rng.random() < 0.45 and len(text) * PER_CHAR < 110_000:
            going.append((at + 15 + rng.expovariate(1 / 60), text + texts.fresh(output)))
    return jobs


def shared(rng: Random, rate: float) -> list[Job]:
    """150 groups, each with a head of 6,000 tokens; about 1,200 fresh tokens in, 250 out."""
    texts = _Texts(rng)
    heads = [texts.fresh(6000) for _ in range(150)]
    return [
        texts.job(at, rng.choice(heads) + texts.fresh(_about(rng, 1200)), _about(rng, 250))
        for at in _arrivals(rng, rate, 2000)
    ]


def heavy(rng: Random, rate: float) -> list[Job]:
    """Nothing shared: 512 tokens in, log-normal outputs (mean 300, sigma 1.5, at most 4,000), 16 slots an engine."""
    texts = _Texts(rng)
    mean = log(300) - 1.5**2 / 2
    return [
        texts.job(at, texts.fresh(512), min(4000, max(1, round(rng.lognormvariate(mean, 1.5)))))
        for at in _arrivals(rng, rate, 3000)
    ]


def hotspot(rng: Random, rate: float) -> list[Job]:
    """Everybody has the same head of 6,000 tokens, and about 1,500 fresh ones; 200 out, cold start."""
    texts = _Texts(rng)
    head = texts.fresh(6000)
    return [texts.job(at, head + texts.fresh(_about(rng, 1500)), _about(rng, 200)) for at in _arrivals(rng, rate, 2000)]


def _about(rng: Random, mean: float) -> int:
    return round(mean * exp(rng.gauss(0, 0.25) - 0.25**2 / 2))


WORKLOADS = (
    Workload("synth", 1_020_000, 128, (14.1, 19.0), synth),
    Workload("conv", 1_020_000, 128, (6.0, 7.5), conv),
    Workload("shared", 240_000, 128, (26.6, 30.1), shared),
    Workload("heavy", 1_020_000, 16, (21.0, 26.0), heavy),
    Workload("hotspot", 240_000, 128, (31.3, 38.5), hotspot),
)
