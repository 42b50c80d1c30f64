"""FastDeploy. Its `/metrics` may be on a port of its own; newer versions add labels."""

from __future__ import annotations

from broker.engines.base import Evidence, mean_permille, permille, total
from broker.types import EngineKind, LoadReport, Trust


class FastDeploy:
    kind = EngineKind.FASTDEPLOY
    join_paths: tuple[str, ...] = ()
    stops_on_hang_up = False  # only with FD_ENABLE_REQUEST_DISCONNECT_STOP_INFERENCE=1

    def recognises(self, evidence: Evidence) -> bool:
        return "fastdeploy" in evidence.owners() or evidence.has_metric(b"fastdeploy:")

    def publishes(self, evidence: Evidence, host: str) -> str:
        return ""

    def report(self, metrics: bytes) -> LoadReport | None:
        running = total(metrics, b"fastdeploy:num_requests_running")
        waiting = total(metrics, b"fastdeploy:num_requests_waiting")
        if running is None and waiting is None:
            return None
        return LoadReport(
            running=running,
            waiting=waiting,
            kv_permille=_kv_permille(metrics),
            capacity=total(metrics, b"fastdeploy:max_batch_size"),
            trust=Trust.APPROX,
        )


def _kv_permille(metrics: bytes) -> int | None:
    use = mean_permille(metrics, b"fastdeploy:gpu_cache_usage_perc")  # 0 to 1 despite its name
    if use is not None:
        return use
    free = total(metrics, b"fastdeploy:available_gpu_block_num", b"available_gpu_block_num")
    blocks = total(metrics, b"fastdeploy:max_gpu_block_num")
    return permille(1 - free / blocks) if free is not None and blocks else None
