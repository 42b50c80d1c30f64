"""What the broker must know of an engine's dialect: how to recognise it and how to read its load. Pure.

Everything here reads bytes that another program wrote: a value that makes no sense is left out, never raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import msgspec

from broker.errors import UNDECODABLE
from broker.types import EngineKind, LoadReport

MODELS_PATH = "/v1/models"
METRICS_PATH = "/metrics"

MOST = 1 << 53
"""Counts above this are garbage: no engine runs as many, and a table cell holds 64 bits."""


class Evidence(msgspec.Struct, frozen=True):
    """What a server answered with status 200: path -> body. `METRICS_PATH` stands for its metrics address."""

    answers: Mapping[str, bytes]

    def owners(self) -> set[str]:
        """`owned_by` of each model it lists, in lower case; engines sign their models there."""
        return {model.owned_by.lower() for model in _models(self.answers.get(MODELS_PATH, b""))}

    def models(self) -> tuple[str, ...]:
        """The names it lists, adapters included; empty = it did not say."""
        return tuple(dict.fromkeys(model.id for model in _models(self.answers.get(MODELS_PATH, b"")) if model.id))

    def has_metric(self, prefix: bytes) -> bool:
        """A metric of that prefix appears in `/metrics`."""
        text = self.answers.get(METRICS_PATH, b"")
        return text.startswith(prefix) or b"\n" + prefix in text


class Dialect(Protocol):
    """One kind of engine."""

    kind: EngineKind
    join_paths: tuple[str, ...]
    """Asked, beside `MODELS_PATH`, when an instance of this kind joins."""
    stops_on_hang_up: bool
    """It ends a request whose connection is closed, also one that waits."""

    def recognises(self, evidence: Evidence) -> bool:
        """The answers bear this engine's mark: the owner of its models, the prefix of its metrics."""

    def publishes(self, evidence: Evidence, host: str) -> str:
        """ZMQ endpoints, comma-separated, at which it says that it publishes its load; empty = it is polled."""

    def report(self, metrics: bytes) -> LoadReport | None:
        """Load from the text of `/metrics`; None = it holds none of this engine's names."""


class _Model(msgspec.Struct):
    id: str = ""
    owned_by: str = ""


class _Models(msgspec.Struct):
    data: list[_Model] = []


_models_decoder = msgspec.json.Decoder(_Models)


def _models(body: bytes) -> list[_Model]:
    try:
        return _models_decoder.decode(body).data
    except UNDECODABLE:
        return []


class Sample(msgspec.Struct, frozen=True):
    """One line of Prometheus text: the bytes between its braces, and its value."""

    labels: bytes
    value: float

    def label(self, name: bytes) -> bytes:
        """A label's value as written; empty = not there."""
        for opening in (name + b'="', b"," + name + b'="'):
            at = self.labels.find(opening)
            if at == 0 or (at > 0 and opening.startswith(b",")):
                start = at + len(opening)
                end = self.labels.find(b'"', start)
                return self.labels[start:end] if end >= 0 else b""
        return b""


def samples(text: bytes, name: bytes) -> Iterator[Sample]:
    """Every finite sample of one metric. Lines that are no samples are passed over.

    Searching a vLLM's page (75 kB) for the few names that are needed costs 60 us, parsing it whole 19 ms: with a
    thousand instances polled each second that is 6 % of one core, or nineteen cores.
    """
    at = -1
    while (at := text.find(name, at + 1)) >= 0:
        if at and text[at - 1] != _NEWLINE:
            continue  # the name within a HELP line, a label or a longer name
        end = text.find(b"\n", at)
        rest = text[at + len(name) : end if end >= 0 else len(text)]
        labels = b""
        if rest.startswith(b"{"):
            close = rest.rfind(b"}")  # label values may hold braces, values and timestamps do not
            if close < 0:
                continue
            labels, rest = rest[1:close], rest[close + 1 :]
        elif not rest[:1].isspace():
            continue  # a longer name that starts with this one
        words = rest.split(None, 1)
        try:
            value = float(words[0])
        except (ValueError, IndexError):
            continue
        if math.isfinite(value):
            yield Sample(labels, value)


_NEWLINE = ord("\n")


def total(text: bytes, *names: bytes) -> int | None:
    """Sum over all samples of all names (ranks, label sets); None = no sample."""
    values = [sample.value for name in names for sample in samples(text, name)]
    return count(sum(values)) if values else None


def mean_permille(text: bytes, *names: bytes) -> int | None:
    """A use between 0 and 1 as 1/1000, the mean over ranks, by the first of the names that has samples."""
    for name in names:
        values = [sample.value for sample in samples(text, name)]
        if values:
            return permille(sum(values) / len(values))
    return None


def count(value: float) -> int | None:
    """A count as it may be stored; None = it is none."""
    return int(value) if 0 <= value <= MOST else None


def permille(use: float) -> int:
    return round(1000 * min(max(use, 0.0), 1.0))
