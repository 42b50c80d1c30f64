"""What Penstock counted, from its /metrics, compared with what the load generator counted."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from benchmarks.peers.http import get

SETTLE_S = 3.0
"""A client has its last byte a moment before the frontend counts the request."""

_LINE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")


@dataclass(frozen=True)
class Totals:
    ok: int
    """Answers that began with status 200."""
    gone: int
    """Clients that left."""
    attempts: int
    retried: int
    broken: int
    in_flight: int

    @classmethod
    def read(cls, base: str) -> Totals:
        return cls.parse(get(f"{base}/metrics").decode())

    @classmethod
    def parse(cls, text: str) -> Totals:
        sums: dict[str, float] = {}
        ok = 0.0
        for line in text.splitlines():
            if found := _LINE.match(line):
                name, labels, value = found.groups()
                sums[name] = sums.get(name, 0.0) + float(value)
                if name == "inference_requests_total" and 'status_code="200"' in labels:
                    ok += float(value)

        def total(name: str) -> int:
            return int(sums.get(name, 0.0))

        return cls(
            ok=int(ok),
            gone=total("penstock_instance_gone_requests_total"),
            attempts=total("penstock_instance_requests_total"),
            retried=total("penstock_instance_retried_requests_total"),
            broken=total("penstock_instance_broken_requests_total"),
            in_flight=total("penstock_instance_in_flight_requests"),
        )


def differences(base: str, before: Totals, run: dict[str, int]) -> list[str]:
    """What does not agree once everything is at rest; empty = all of it does."""
    end = time.monotonic() + SETTLE_S
    while True:
        found = compare(before, Totals.read(base), run)
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def compare(before: Totals, after: Totals, run: dict[str, int]) -> list[str]:
    """Every request of the load generator is one attempt (and one more per retry) and ended in one way."""
    expected = {
        "attempts": (after.attempts - before.attempts, run["sent"] + after.retried - before.retried),
        "gone": (after.gone - before.gone, run["unfinished"]),
        # A client that leaves a running stream had its 200 already.
        "answers 200": (after.ok - before.ok, run["answered"] + run["wrong_body"] + run["unfinished"]),
        "broken": (after.broken - before.broken, 0),
        "in flight": (after.in_flight, 0),
    }
    return [f"{name}: {has}, not {wanted}" for name, (has, wanted) in expected.items() if has != wanted]
