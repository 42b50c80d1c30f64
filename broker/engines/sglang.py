"""SGLang: `/metrics` (when enabled), or its `LoadStat` messages, pushed by one publisher per data-parallel rank."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from broker.engines.base import Evidence, count, mean_permille, permille, samples
from broker.errors import UNDECODABLE
from broker.types import EngineKind, LoadReport, Trust

SERVER_INFO_PATHS = ("/server_info", "/get_server_info")
"""Newer releases have the first, older ones the second."""

MOST_RANKS = 64
"""Data-parallel ranks of one instance."""

_WAITING = (
    b"sglang:num_queue_reqs",
    b"sglang:num_grammar_queue_reqs",
    b"sglang:num_prefill_bootstrap_queue_reqs",
    b"sglang:num_prefill_inflight_queue_reqs",
    b"sglang:num_decode_prealloc_queue_reqs",
    b"sglang:num_decode_transfer_queue_reqs",
)


class SGLang:
    kind = EngineKind.SGLANG
    join_paths: tuple[str, ...] = SERVER_INFO_PATHS
    stops_on_hang_up = True

    def recognises(self, evidence: Evidence) -> bool:
        return "sglang" in evidence.owners() or evidence.has_metric(b"sglang:")

    def publishes(self, evidence: Evidence, host: str) -> str:
        answers = (evidence.answers.get(path, b"") for path in SERVER_INFO_PATHS)
        return next((found for body in answers if (found := load_endpoints(body, host))), "")

    def report(self, metrics: bytes) -> LoadReport | None:
        running = _over_ranks(metrics, b"sglang:num_running_reqs")
        waiting = [n for name in _WAITING if (n := _over_ranks(metrics, name)) is not None]
        if running is None and not waiting:
            return None
        return LoadReport(
            running=running,
            waiting=sum(waiting) if waiting else None,
            kv_permille=mean_permille(metrics, b"sglang:token_usage"),
            trust=Trust.APPROX,
        )


def _over_ranks(metrics: bytes, name: bytes) -> int | None:
    """Summed over data-parallel ranks. Within one, every tensor-parallel rank may show the same requests again,
    and a total stand beside its parts by priority: there the largest sample counts."""
    ranks: dict[bytes, float] = {}
    for sample in samples(metrics, name):
        rank = sample.label(b"dp_rank")
        ranks[rank] = max(sample.value, ranks.get(rank, 0.0))
    return count(sum(ranks.values())) if ranks else None


class LoadStat(msgspec.Struct, frozen=True, array_like=True, tag="LoadStat"):
    """The stable prefix of SGLang's message and the fields appended since; longer messages decode too."""

    running: int
    waiting: int
    tokens_used: int
    tokens_capacity: int
    """0 = unknown."""
    rank: int = 0
    waiting_uncached_tokens: int = -1
    tokens_used_plus_queued: int = -1
    max_running: int = -1


def load_report(stats: Iterable[LoadStat]) -> LoadReport:
    """The load of an instance from the newest message of each of its ranks."""
    stats = list(stats)
    used, blocks = sum(s.tokens_used for s in stats), sum(s.tokens_capacity for s in stats)
    return LoadReport(
        running=_sum(s.running for s in stats),
        waiting=_sum(s.waiting for s in stats),
        waiting_tokens=_sum(s.waiting_uncached_tokens for s in stats),
        kv_permille=permille(used / blocks) if blocks > 0 else None,
        capacity=_sum(s.max_running for s in stats),
    )


def _sum(values: Iterable[int]) -> int | None:
    """None as soon as one is unknown: half a sum is no sum."""
    known = list(values)
    return count(sum(known)) if known and min(known) >= 0 else None


class _KvEvents(msgspec.Struct):
    load_endpoint_port_base: int | None = None
    dp_size: int = 1


class _ServerInfo(msgspec.Struct):
    kv_events: _KvEvents | None = None


def load_endpoints(server_info: bytes, host: str) -> str:
    """Where the ranks publish, from the answer at `SERVER_INFO_PATHS`: comma-separated, empty = they do not.

    The engine binds a wildcard or an address of its own view, so `host` is that of its URL.
    """
    try:
        events = msgspec.json.decode(server_info, type=_ServerInfo).kv_events
    except UNDECODABLE:
        return ""
    if events is None or events.load_endpoint_port_base is None or not 1 <= events.dp_size <= MOST_RANKS:
        return ""
    ports = range(events.load_endpoint_port_base, events.load_endpoint_port_base + events.dp_size)
    if ports.start < 1 or ports.stop > 65536:
        return ""
    return ",".join(f"tcp://{host}:{port}" for port in ports)
