"""Penstock's own engine protocol (`docs/wire.md`): engines register, beat and publish over ZMQ."""

from __future__ import annotations

from broker import wire
from broker.engines.base import MOST, Evidence
from broker.types import EngineKind, LoadReport


class Native:
    kind = EngineKind.NATIVE
    join_paths: tuple[str, ...] = ()
    stops_on_hang_up = True

    def recognises(self, evidence: Evidence) -> bool:
        return False  # it speaks no HTTP

    def publishes(self, evidence: Evidence, host: str) -> str:
        return ""

    def report(self, metrics: bytes) -> LoadReport | None:
        return None


def load_report(load: wire.Load) -> LoadReport:
    """What a `Load` message says; -1 and what cannot be are unknown."""
    running, waiting, tokens, kv = load.running, load.waiting, load.waiting_tokens, load.kv_permille
    return LoadReport(
        running=running if 0 <= running <= MOST else None,
        waiting=waiting if 0 <= waiting <= MOST else None,
        waiting_tokens=tokens if 0 <= tokens <= MOST else None,
        kv_permille=min(kv, 1000) if kv >= 0 else None,
    )
