"""The kinds of load, and how the engines answer in each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

KIB = 1024


class Kind(Enum):
    WHOLE = "answers in one piece"
    STREAM = "streams, one after the other on each connection"
    HOLD = "streams held open, for memory"


@dataclass(frozen=True)
class Pace:
    """How an engine streams; the fields are settings of `tools/control.h`."""

    events: int = 64
    first_us: int = 20_000
    interval_us: int = 20_000
    lockstep: int = 0

    @property
    def line(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items())


@dataclass(frozen=True)
class Scenario:
    name: str
    kind: Kind
    connections: int
    says: str
    """One line for the table's head."""
    body_bytes: int = KIB
    cache: bool = False
    """512 prompts that share prefixes, for cache-aware policies, instead of one prompt."""
    pace: Pace = Pace()
    ramp_ms: float = 0
    """The connections begin one after the other within this time, so that their streams are not in step by chance."""


STREAM_MS = 1280.0
"""How long a stream of 64 tokens lasts; streams begin evenly spread over it."""

_ALL = (
    Scenario("ns1", Kind.WHOLE, 1, "1 connection, 1 KiB, no stream"),
    Scenario("ns32", Kind.WHOLE, 32, "32 connections, 1 KiB, no stream"),
    Scenario("ns128", Kind.WHOLE, 128, "128 connections, 1 KiB, no stream"),
    Scenario("cache", Kind.WHOLE, 32, "32 connections, 512 prompts of 32 KiB sharing 8 prefixes of 24 KiB", cache=True),
    Scenario(
        "lock500",
        Kind.STREAM,
        500,
        "500 streams, 50 tokens/s each, all in lockstep",
        pace=Pace(lockstep=1),
        ramp_ms=STREAM_MS,
    ),
    Scenario("paced500", Kind.STREAM, 500, "500 streams, 50 tokens/s each, each at its own pace", ramp_ms=STREAM_MS),
    Scenario(
        "open5000",
        Kind.HOLD,
        5000,
        "5,000 streams held open, 1 token/s each",
        pace=Pace(events=100_000, first_us=1000, interval_us=1_000_000),
        ramp_ms=8000,
    ),
)

SCENARIOS = {s.name: s for s in _ALL}
