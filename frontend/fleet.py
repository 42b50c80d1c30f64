"""The fleet as people and tools are shown it: one row per registered instance, out of shared memory."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import msgspec

from broker.counters import CounterColumn
from broker.errors import UNDECODABLE
from broker.table import UNKNOWN, Column, QueueColumn, State
from broker.types import Trust
from broker.view import Entry, TableReader


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One instance, its load and its counters. None = not known."""

    url: str
    role: str
    state: str
    engine: str
    models: tuple[str, ...]
    capacity: int | None
    in_flight: int
    """Requests that this host's frontends have there now."""
    in_flight_tokens: int
    running: int | None
    waiting: int | None
    waiting_tokens: int | None
    kv_use: float | None
    """0 to 1."""
    report_age_s: float | None
    trust: str
    slot: int
    generation: int
    incarnation: str | None
    metrics_url: str | None
    load_endpoint: str | None
    transfer: Any
    """As registered when that was JSON, else `{"base64": ...}`."""
    fastdeploy: Any
    name: str | None
    """What people call it."""


def rows(table: TableReader, now_ns: int) -> list[Row]:
    """Every registered instance, sorted by URL."""
    return [_row(table, entry, now_ns) for entry in table.entries()]


def _row(table: TableReader, entry: Entry, now_ns: int) -> Row:
    instance = entry.instance
    cells: list[int] = table.snapshot[:, entry.slot].tolist()
    in_flight, tokens = table.counters.in_flight(entry.slot)
    reported_ns = cells[Column.REPORTED_NS]
    age_ns = now_ns - reported_ns if reported_ns else None
    is_stale = age_ns is None or age_ns > table.stale_after_ns
    kv_permille = _known(cells[Column.KV_PERMILLE])
    return Row(
        url=instance.url,
        role=instance.role.name.lower(),
        state=entry.state.name.lower(),
        engine=instance.engine,
        models=instance.models,
        capacity=cells[Column.CAPACITY] or None,
        in_flight=in_flight,
        in_flight_tokens=tokens,
        running=_known(cells[Column.RUNNING]),
        waiting=_known(cells[Column.WAITING]),
        waiting_tokens=_known(cells[Column.WAITING_TOKENS]),
        kv_use=None if kv_permille is None else kv_permille / 1000,
        report_age_s=None if age_ns is None else max(0, age_ns) / 1e9,
        trust=(Trust.STALE if is_stale else Trust(cells[Column.TRUST])).name.lower(),
        slot=entry.slot,
        generation=entry.generation,
        incarnation=instance.incarnation.hex() or None,
        metrics_url=instance.metrics_url or None,
        load_endpoint=instance.load_endpoint or None,
        transfer=_shown(instance.transfer),
        fastdeploy=instance.fastdeploy,
        name=instance.name or None,
    )


class QueueRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the admission queue has to do with one instance."""

    url: str
    tickets: int
    """Requests in line that prefer it."""
    tokens: int
    reserved: int
    """Granted, on their way to a lease."""
    lent: int
    """Places that requests of other hosts have, or are offered."""
    granted: int
    """Since it registered, as all that follow."""
    wait_s: float
    """In line, of all those together."""
    stolen: int
    """Of those granted: from another instance's line."""
    robbed: int
    """From its own line, by others."""
    returned: int
    """Of those granted: back in line, as it could not be taken."""
    rescued: int
    """Sent to it, taken back before the first byte and sent elsewhere."""


def queue(table: TableReader) -> list[QueueRow]:
    """Every registered instance, sorted by URL."""
    return [_queue_row(table, entry) for entry in table.entries()]


def _queue_row(table: TableReader, entry: Entry) -> QueueRow:
    slots = len(table.queue) // len(QueueColumn)
    cells = {column: table.queue[column * slots + entry.slot] for column in QueueColumn}
    counted = table.counted(entry)
    return QueueRow(
        url=entry.instance.url,
        tickets=cells[QueueColumn.TICKETS],
        tokens=cells[QueueColumn.TOKENS],
        reserved=cells[QueueColumn.RESERVED],
        lent=cells[QueueColumn.LENT],
        granted=cells[QueueColumn.GRANTED],
        wait_s=cells[QueueColumn.WAITED_US] / 1e6,
        stolen=cells[QueueColumn.STOLEN],
        robbed=cells[QueueColumn.ROBBED],
        returned=cells[QueueColumn.RETURNED],
        rescued=counted[CounterColumn.RESCUED] if counted is not None else 0,
    )


def _known(value: int) -> int | None:
    return None if value == UNKNOWN else value


def _shown(transfer: bytes) -> Any:
    if not transfer:
        return None
    try:
        return msgspec.json.decode(transfer)
    except UNDECODABLE:
        return {"base64": base64.b64encode(transfer).decode("ascii")}


def models(table: TableReader, aliases: Mapping[str, str]) -> list[str]:
    """The names that can be asked for: of the instances that are ready, and the aliases that lead to one of them."""
    ready = [entry.instance for entry in table.entries() if entry.state is State.READY]
    served = {name for instance in ready for name in instance.models}
    serves_any = any(not instance.models for instance in ready)
    return sorted(served.union(alias for alias, meant in aliases.items() if serves_any or meant in served))
