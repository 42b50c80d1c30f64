"""Penstock's own engine protocol (`docs/wire.md`): engines register, beat and publish over ZMQ."""

from __future__ import annotations

from broker import wire
from broker.engines.base import Evidence, count, permille
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
    return LoadReport(
        running=count(load.running),
        waiting=count(load.waiting),
        waiting_tokens=count(load.waiting_tokens),
        kv_permille=permille(load.kv_permille / 1000) if load.kv_permille >= 0 else None,
    )
