"""What is left of a request that has ended: a count, and its line in the log."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Final

from broker.counters import FrontendCounters, TotalColumn
from broker.lines import Lines
from broker.narrator import printable
from shm.cells import add

access: Final = Lines("penstock.access")

_USAGE: Final = b'"completion_tokens"'
_MOST_DIGITS: Final = 12
_USAGE_WITHIN: Final = 2048
"""The usage is looked for in that many of the last bytes of a chunk."""

_BLANKS: Final = (0x20, 0x09, 0x0A, 0x0D)
_COLON: Final = 0x3A
_ZERO: Final = 0x30
_NINE: Final = 0x39

_CLASSES: Final = (
    *[int(TotalColumn.RESPONSES_2XX)] * 3,
    int(TotalColumn.RESPONSES_3XX),
    int(TotalColumn.RESPONSES_4XX),
    *[int(TotalColumn.RESPONSES_5XX)] * 5,
)
"""By the first digit of the status."""


class Outcome(StrEnum):
    """How a request ended, as its log line says it."""

    DONE = "done"  # the instance's answer, whatever its status, is whole
    FAILED = "failed"  # an error of ours instead of an answer
    BROKEN = "broken"  # the answer had begun, and was cut off with an explicit error
    GONE = "gone"  # the client left


def count_response(counters: FrontendCounters, status: int) -> None:
    """Counts an answer to an inference request by its class; one that its client left before is a 499."""
    add(counters.totals, _CLASSES[status // 100], 1)


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
    reason: str | None,
) -> None:
    """The line of a request that was forwarded. `end`: the last chunks of its answer, the last one first. `reason`: of
    its failure, if its client was not told it."""
    if attempts == 1 and status == 200 and queued_s is None and stolen_from == "-" and rescued_from == "-":
        way = _USUAL_WAY
    else:
        queue_ms = "-" if queued_s is None else _ms(queued_s)
        way = (
            f" attempts={attempts} status={status} queue_ms={queue_ms}"
            f" stolen_from={stolen_from} rescued_from={rescued_from} ttft_ms="
        )
    duration_ms = _ms(duration_s)
    if first_byte_s is None:
        ttft_ms = "-"
    elif first_byte_s == duration_s:  # an answer that was not streamed
        ttft_ms = duration_ms
    else:
        ttft_ms = _ms(first_byte_s)
    hidden = f" reason={json.dumps(reason)}" if reason else ""
    word: str = outcome
    access.write(
        f"id={ident.decode()} {_where(path, model, instance, policy)}{way}{ttft_ms} duration_ms={duration_ms}"
        f" bytes={_number_of(size)} tokens={_completion_tokens(end)} outcome={word}{hidden}"
    )


_USUAL_WAY: Final = " attempts=1 status=200 queue_ms=- stolen_from=- rescued_from=- ttft_ms="
"""Of nearly all: each part of a line takes as long as a good many of its letters."""


_MOST_WHERE: Final = 1024
_wheres: Final[dict[tuple[str, str | None, str, str], str]] = {}
"""They come again with every request; bounded, as paths and models are the clients' words."""


class _Where:
    """What was said last of an instance, which is most often said again."""

    def __init__(self, path: str, model: str | None, policy: str, said: str) -> None:
        self.path = path
        self.model = model
        self.policy = policy
        self.said = said


_last: Final[dict[str, _Where]] = {}
"""By instance; as bounded."""


def _where(path: str, model: str | None, instance: str, policy: str) -> str:
    last = _last.get(instance)
    if last is not None and last.path == path and last.model == model and last.policy == policy:
        return last.said
    key = path, model, instance, policy
    known = _wheres.get(key)
    if known is None:
        if len(_wheres) >= _MOST_WHERE:
            _wheres.clear()
        shown = printable(path.partition("?")[0])
        known = f"path={shown} model={printable(model or '-')} instance={instance} policy={policy}"
        _wheres[key] = known
    if last is None and len(_last) >= _MOST_WHERE:
        _last.clear()
    _last[instance] = _Where(path, model, policy, known)
    return known


def _ms(seconds: float) -> str:
    """Milliseconds with one digit behind the point. (Formatting a float takes several times as long, compiled.)"""
    tenths = int(seconds * 1e4 + 0.5)
    return _number_of(tenths // 10) + _TENTHS[tenths % 10]


_NUMBERS: Final = tuple([str(number) for number in range(4096)])
_TENTHS: Final = tuple([f".{tenth}" for tenth in range(10)])


def _number_of(number: int) -> str:
    """Its digits; small ones, as most are, have been made before."""
    return _NUMBERS[number] if 0 <= number < len(_NUMBERS) else str(number)


def _completion_tokens(chunks: tuple[bytes, ...]) -> str:
    """Where the engine said them at the end of its answer."""
    for chunk in chunks:
        tail = chunk if len(chunk) <= _USAGE_WITHIN else chunk[-_USAGE_WITHIN:]
        found = tail.rpartition(_USAGE)  # `rfind` takes twice as long to understand its arguments
        if found[1] and (digits := _number(found[2])):
            return digits
    return "-"


def _number(data: bytes) -> str:
    """The digits of a number behind a colon; nothing, if that is not what is there. (By hand, as it is compiled: a
    regular expression and its match took three times as long.)"""
    at, size = 0, len(data)
    while at < size and data[at] in _BLANKS:
        at += 1
    if at == size or data[at] != _COLON:
        return ""
    at += 1
    while at < size and data[at] in _BLANKS:
        at += 1
    start, number = at, 0
    while at < size and at < start + _MOST_DIGITS and _ZERO <= data[at] <= _NINE:
        number = number * 10 + data[at] - _ZERO
        at += 1
    return _number_of(number) if at > start else ""
