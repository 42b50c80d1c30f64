"""vLLM. One sample per data-parallel rank (`engine="0"`, ...), whichever API server answers."""

from __future__ import annotations

from broker.engines.base import Evidence, mean_permille, total
from broker.types import EngineKind, LoadReport, Trust


class VLLM:
    kind = EngineKind.VLLM
    join_paths: tuple[str, ...] = ()
    stops_on_hang_up = True

    def recognises(self, evidence: Evidence) -> bool:
        return "vllm" in evidence.owners() or evidence.has_metric(b"vllm:")

    def publishes(self, evidence: Evidence, host: str) -> str:
        return ""

    def report(self, metrics: bytes) -> LoadReport | None:
        running = total(metrics, b"vllm:num_requests_running")
        waiting = total(metrics, b"vllm:num_requests_waiting")
        if running is None and waiting is None:
            return None
        return LoadReport(
            running=running,
            waiting=waiting,
            # renamed in 0.10
            kv_permille=mean_permille(metrics, b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc"),
            trust=Trust.APPROX,
        )
