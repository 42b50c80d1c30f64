"""What is left of a request that has ended: a count, and its line in the log."""

from __future__ import annotations

import re
from enum import StrEnum

from broker.batched import Lines
from broker.counters import FrontendCounters, TotalColumn
from broker.narrator import printable

access = Lines("penstock.access")

_USAGE = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,12})')
_USAGE_WITHIN = 2048
"""The usage is looked for in that many of the last bytes of a chunk."""

_CLASSES = (
    TotalColumn.RESPONSES_2XX,
    TotalColumn.RESPONSES_3XX,
    TotalColumn.RESPONSES_4XX,
    TotalColumn.RESPONSES_5XX,
)


class Outcome(StrEnum):
    """How a request ended, as its log line says it."""

    DONE = "done"  # the instance's answer, whatever its status, is whole
    FAILED = "failed"  # an error of ours instead of an answer
    BROKEN = "broken"  # the answer had begun, and was cut off with an explicit error
    GONE = "gone"  # the client left


def count_response(counters: FrontendCounters, status: int) -> None:
    """Counts an answer to an inference request by its class; one that its client left before is a 499."""
    counters.count(_CLASSES[min(max(status // 100, 2), 5) - 2])


def log_end(
    *,
    ident: bytes,
    path: str,
    model: str | None,
    instance: str,
    policy: str,
    attempts: int,
    status: int,
    queued_s: float | None,
    stolen_from: str,
    rescued_from: str,
    first_byte_s: float | None,
    duration_s: float,
    size: int,
    end: tuple[bytes, ...],
    outcome: Outcome,
) -> None:
    """The line of a request that was forwarded. `end`: the last chunks of its answer, the last one first."""
    access.info(
        "id=%s path=%s model=%s instance=%s policy=%s attempts=%d status=%d queue_ms=%s stolen_from=%s rescued_from=%s "
        "ttft_ms=%s duration_ms=%.1f bytes=%d tokens=%s outcome=%s",
        ident.decode("ascii"),
        printable(path.partition("?")[0]),
        printable(model or "-"),
        instance,
        policy,
        attempts,
        status,
        "-" if queued_s is None else f"{queued_s * 1e3:.1f}",
        stolen_from,
        rescued_from,
        "-" if first_byte_s is None else f"{first_byte_s * 1e3:.1f}",
        duration_s * 1e3,
        size,
        _completion_tokens(end),
        outcome,
    )


def _completion_tokens(chunks: tuple[bytes, ...]) -> str:
    """Where the engine said them at the end of its answer."""
    for chunk in chunks:
        if found := _USAGE.findall(chunk[-_USAGE_WITHIN:]):
            last: bytes = found[-1]
            return last.decode()
    return "-"
