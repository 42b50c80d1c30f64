"""Any server that speaks OpenAI's API and of which nothing else is known. It tells no load: live counters decide."""

from __future__ import annotations

from broker.engines.base import MODELS_PATH, Evidence
from broker.types import EngineKind, LoadReport


class OpenAI:
    kind = EngineKind.OPENAI
    join_paths: tuple[str, ...] = ()
    stops_on_hang_up = False  # nobody knows

    def recognises(self, evidence: Evidence) -> bool:
        return MODELS_PATH in evidence.answers

    def publishes(self, evidence: Evidence, host: str) -> str:
        return ""

    def report(self, metrics: bytes) -> LoadReport | None:
        return None
