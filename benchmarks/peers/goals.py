"""What Penstock promises of its cost, as rows that a run is judged by. `bar` is the promise, `stretch` the wish."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.peers.samples import Samples

PEERS = ("sgl-rr", "vllmr-rr", "fd-rr")
HTTP, NATIVE, CACHE = "penstock-rr", "penstock-zmq", "penstock-cache"
Row = tuple[str, str, str, str, str, str]
"""Case, against whom, measured, bar, stretch, verdict."""


@dataclass(frozen=True)
class Ratio:
    """Cost of ours against theirs in pinned mode: work per CPU second, at least; or CPU per event, at most."""

    case: str
    scenario: str
    ours: str
    theirs: str
    bar: float | None
    stretch: float | None
    per_event: bool = False


RATIOS = (
    Ratio("HTTP engine, 1 KiB, no stream", "ns32", HTTP, "sgl-rr", 2.5, 3.5),
    Ratio("HTTP engine, 1 KiB, no stream", "ns32", HTTP, "vllmr-rr", 2.0, 3.0),
    Ratio("HTTP engine, 1 KiB, no stream", "ns32", HTTP, "fd-rr", 5.0, 8.0),
    Ratio("HTTP engine, 1 KiB, no stream", "ns32", HTTP, "nginx", None, 0.7),
    Ratio("native engine, 1 KiB, no stream", "ns32", NATIVE, "sgl-rr", 2.0, 2.5),
    Ratio("cache_aware, 32 KiB", "cache", CACHE, "sgl-cache", 2.0, 3.5),
    Ratio("cache_aware, 32 KiB", "cache", CACHE, "vllmr-cache", 6.0, 12.0),
    Ratio("500 streams in lockstep, HTTP engine", "lock500", HTTP, "sgl-rr", 0.7, None, per_event=True),
    Ratio("500 streams in lockstep, HTTP engine", "lock500", HTTP, "vllmr-rr", 0.8, None, per_event=True),
    Ratio("500 streams in lockstep, HTTP engine", "lock500", HTTP, "nginx", None, 1.1, per_event=True),
    Ratio("500 streams in lockstep, native engine", "lock500", NATIVE, "sgl-rr", 0.45, 0.30, per_event=True),
    Ratio("500 streams in lockstep, native engine", "lock500", NATIVE, "vllmr-rr", 0.55, 0.35, per_event=True),
    Ratio("500 streams in lockstep, native engine", "lock500", NATIVE, "nginx", None, 0.5, per_event=True),
)

ADDED_FIRST_MS = (("first_p50_ms", 2.0, 0.5), ("first_p99_ms", 12.0, 5.0))
KEPT = (0.85, 0.92)
BALANCED = 0.4
IDLE_MIB = 60.0
KIB_PER_STREAM = (25.0, 12.0)


def judge(samples: Samples) -> Iterator[Row]:
    """A row for every goal of which the run has the figures."""
    yield from _ratios(samples)
    yield from _added_latency(samples)
    yield from _paced(samples)
    yield from _kept(samples)
    yield from _memory(samples)


def _ratios(samples: Samples) -> Iterator[Row]:
    for goal in RATIOS:
        found = samples.ratios("pinned", goal.scenario, goal.ours, goal.theirs, "work_per_cpu_s")
        if not found:
            continue
        value = statistics.median(found)
        if goal.per_event:
            what, value = "CPU per event / theirs", 1 / value
        else:
            what = "requests per CPU-s / theirs"
        yield _row(f"{goal.case}: {what}", goal.theirs, value, goal.bar, goal.stretch, "x", at_most=goal.per_event)


def _added_latency(samples: Samples) -> Iterator[Row]:
    def added(router: str) -> float | None:
        through = samples.median("pinned", "ns1", router, "latency_p50_ms")
        direct = samples.median("pinned", "ns1", "direct", "latency_p50_ms")
        return None if through is None or direct is None else through - direct

    ours, nginx = added(HTTP), added("nginx")
    peers = [value for peer in PEERS if (value := added(peer)) is not None]
    if ours is not None and peers:
        stretch = None if nginx is None else 1.3 * nginx
        yield _row("1 connection: added latency p50", "best peer", ours, min(peers), stretch, " ms", at_most=True)


def _paced(samples: Samples) -> Iterator[Row]:
    def median(router: str, key: str) -> float | None:
        return samples.median("pinned", "paced500", router, key)

    for ours in (HTTP, NATIVE):
        for key, bar, stretch in ADDED_FIRST_MS:
            through, direct = median(ours, key), median("direct", key)
            if through is not None and direct is not None:
                case = f"500 paced streams, {ours}: added {key.removesuffix('_ms')}"
                yield _row(case, "direct", through - direct, bar, stretch, " ms", at_most=True)
        gap = median(ours, "gap_p99_ms")
        peers = [value for peer in PEERS if (value := median(peer, "gap_p99_ms")) is not None]
        if gap is not None and peers:
            case = f"500 paced streams, {ours}: inter-token p99"
            yield _row(case, "best peer", gap, min(peers), None, " ms", at_most=True)


def _kept(samples: Samples) -> Iterator[Row]:
    for ours in (HTTP, NATIVE):
        found = samples.ratios("free", "ns32", f"{ours}@2", ours, "work_per_cpu_s")
        if not found:
            continue
        yield _row(f"2 workers: work per CPU-s kept, {ours}", "1 worker", statistics.median(found), *KEPT, "x")
        share = samples.median("free", "ns32", f"{ours}@2", "second_share")
        if share is not None:
            yield _row(f"2 workers: CPU share of the less busy one, {ours}", "", share, BALANCED, None, "")


def _memory(samples: Samples) -> Iterator[Row]:
    frontends = [
        process["private"] / 1024
        for sample in samples.idle()
        if sample["router"].startswith("penstock")
        for process in sample["processes"]
        if process["process"].endswith("-m frontend")
    ]
    if frontends:
        yield _row("idle frontend, private memory", "", max(frontends), IDLE_MIB, None, " MiB", at_most=True)
    for ours in (HTTP, NATIVE):
        value = samples.median("pinned", "open5000", ours, "kib_per_stream")
        if value is not None:
            yield _row(f"memory per open stream, {ours}", "", value, *KIB_PER_STREAM, " KiB", at_most=True)


def _row(
    case: str,
    against: str,
    value: float,
    bar: float | None,
    stretch: float | None,
    unit: str,
    *,
    at_most: bool = False,
) -> Row:
    def met(limit: float | None) -> bool:
        return limit is not None and (value <= limit if at_most else value >= limit)

    def shown(limit: float | None) -> str:
        return "-" if limit is None else f"{'<=' if at_most else '>='} {limit:.2f}{unit}"

    verdict = "stretch" if met(stretch) else "met" if met(bar) else "-" if bar is None else "MISSED"
    return case, against, f"{value:.2f}{unit}", shown(bar), shown(stretch), verdict
