"""What may go wrong on purpose. Set on the command line and at run time by `POST /fault`."""

from __future__ import annotations

import random
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from broker.worker.request import EngineError

Malformed = Literal["", "head", "truncated", "frame", "gap"]
"""head: an HTTP head that is none. truncated: the HTTP body ends early. frame: garbage on the data socket before the
answer. gap: a sequence number is left out. The first two need HTTP, the others ZMQ."""


class Faults(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Everything off by default. Token counts are per request."""

    slow: Annotated[float, Meta(gt=0)] = 1.0
    """Steps take this many times longer."""
    hang_after: Annotated[int, Meta(ge=0)] | None = None
    """Answers stop for good after this many tokens, and hold their place."""
    die_after: Annotated[int, Meta(ge=0)] | None = None
    """The process dies at once when an answer would go on after this many tokens."""
    reject_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Share of the requests that are refused with `reject_status`."""
    reject_status: Annotated[int, Meta(ge=400, le=599)] = 500
    silent_metrics: bool = False
    """`/metrics` does not answer, and no load is published."""
    unhealthy: bool = False
    """`/health` answers 503."""
    malformed: Malformed = ""

    def changed(self, patch: bytes) -> Faults:
        """With the fields of a JSON object replaced. Raises `EngineError` 400 naming what is wrong."""
        try:
            fields = msgspec.json.decode(patch, type=dict[str, object])
            return msgspec.convert({**msgspec.to_builtins(self), **fields}, Faults)
        except msgspec.DecodeError as e:
            raise EngineError(400, f"bad fault: {e}") from e

    def admit(self, rng: random.Random) -> None:
        """Raises `EngineError` for the share that is refused."""
        if self.reject_share and rng.random() < self.reject_share:
            raise EngineError(self.reject_status, "refused on purpose")
