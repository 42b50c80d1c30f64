"""The segment `load`: what is known of each instance, by slot.

Its one writer is the scheduler (`broker.table_writer`, which tells a slot's life); frontends read it (`broker.view`).

    block     shape                    written
    cells     (Cell,)                  one by one
    events    (SchedulerEvent,)        one by one; counters that go on through all lives of the scheduler
    sequence  (slots,)                 odd while a row is being written (`shm.seqlock`)
    values    (Column, slots)          a row inside its odd window
    queue     (QueueColumn, slots)     one by one
    base      (CounterColumn, slots)   inside the odd window in which a generation begins
    blobs     (slots, BLOB_BYTES)      inside an odd window: msgpack of the row's `Instance`
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

import msgspec

from broker.config import Config
from broker.counters import CounterColumn
from broker.errors import MetadataTooLarge
from broker.types import Instance
from shm.segment import Block, Layout, Segment

LOAD = "load"
"""File name in the run directory."""
MAX_BLOB_BYTES = 8192
BEAT_S = 0.25
"""The scheduler stores BEAT_NS this often."""
UNKNOWN = -1
"""What an engine did not say."""


class State(IntEnum):
    """Of a slot. Only READY ones are candidates; the first four below RESTING hold an instance or nothing."""

    FREE = 0
    READY = 1
    DRAINING = 2  # serves what it has, gets nothing new
    DOWN = 3  # unhealthy; still registered, still probed
    RESTING = 4  # removed; no instance


HOLDS_INSTANCE = frozenset({State.READY, State.DRAINING, State.DOWN})


class Column(IntEnum):
    """Per slot. Numbers that the engine did not say are UNKNOWN."""

    STATE = 0
    GENERATION = 1  # of the slot's use; stored before the STATE that it belongs to
    ROLE = 2
    TRUST = 3
    RUNNING = 4
    WAITING = 5
    WAITING_TOKENS = 6
    KV_PERMILLE = 7
    CAPACITY = 8  # 0 = unknown
    REPORTED_NS = 9  # CLOCK_MONOTONIC of the last report; 0 = never
    IN_FLIGHT_THEN = 10  # summed live counters when that report was applied
    TOKENS_THEN = 11
    BLOB_VERSION = 12
    BLOB_BYTES = 13
    IDLE_SINCE_NS = 14  # while RESTING: since when nothing has been in flight; 0 = something was
    WAITED = 15  # reports running that said that requests wait
    LENT_THEN = 16  # places lent to other hosts when that report was applied


class QueueColumn(IntEnum):
    """Per slot, cell by cell: what the admission queue (`broker.scheduler.admission`) has to do with the instance."""

    HELD = 0  # 1 while tickets wait that the instance could serve: whoever comes now stands in line behind them
    RESERVED = 1  # granted tickets whose lease is not seen in the counters yet
    TICKETS = 2  # waiting that prefer the instance, and their prompt tokens
    TOKENS = 3
    GRANTED = 4  # since the slot's generation began, as the next two; those returned later included
    STOLEN = 5  # of those granted: from another instance's queue
    ROBBED = 6  # tickets that preferred the instance and were granted to another
    LENT = 7  # places that requests of other hosts have, or are offered
    RETURNED = 8  # of those granted: back in line, as the instance could not be taken; since the generation began
    WAITED_US = 9  # in line, of all those granted; since the generation began


class Cell(IntEnum):
    VERSION = 0  # rises after every row written
    MEMBERSHIP = 1  # rises after every change of a state, generation or blob
    USED = 2  # slots below it have ever been used
    BEAT_NS = 3  # CLOCK_MONOTONIC of the scheduler's last sign of life
    READY = 4  # 1 once the configured instances have had their first chance
    CLUSTER = 5  # `ClusterState`
    HOSTS = 6  # members of the cluster, this one included; 0 = not joined


class ClusterState(IntEnum):
    """Of the global scheduler at this host (`broker.cluster`)."""

    OFF = 0  # `scheduler.name` is local
    JOINED = 1
    AWAY = 2  # Redis cannot be used: the host goes on alone


class SchedulerEvent(IntEnum):
    """What the scheduler counts of itself; only rises."""

    REGISTRATIONS = 0  # answered well, repeated ones included
    REGISTRATIONS_REFUSED = 1
    HEALTH_CHECKS_FAILED = 2
    POLLS_FAILED = 3  # `/metrics` did not answer, or not with load
    FRAMES_DROPPED = 4  # malformed, oversized or foreign
    LOADS_DROPPED = 5  # of instances that are not registered
    LOADS_MISSED = 6  # by the gaps in publishers' sequences
    REPLIES_DROPPED = 7  # the peer was gone, or took no more
    TICKETS_OFFERED = 8  # requests that began to wait, repeated offers not counted
    TICKETS_GRANTED = 9
    TICKETS_STOLEN = 10  # granted to another instance than they preferred
    TICKETS_RETURNED = 11  # granted, and back in line because the instance could not be taken
    TICKETS_WITHDRAWN = 12  # their client left, their time was over, or their frontend died
    TICKETS_REFUSED = 13  # the queue was full, or nobody serves them any more
    NOTICES_APPLIED = 14  # prompts entered into the prefix index
    NOTICES_DROPPED = 15  # for an instance that is gone, or more than could be entered in time
    CLUSTER_OFFERED = 16  # places of ours that were offered to another host
    CLUSTER_LENT = 17  # of those: given back after a request had run there
    CLUSTER_BORROWED = 18  # requests of ours that were granted an instance of another host
    CLUSTER_DECLINED = 19  # offers to us that nobody needed any more
    CLUSTER_RETURNED = 20  # places of ours that were given back, used or not
    CLUSTER_EXPIRED = 21  # places of ours whose lease ran out
    CLUSTER_IGNORED = 22  # records in Redis that are foreign, or of another version
    CLUSTER_ROUND_TRIPS = 23  # to Redis
    CLUSTER_LOST = 24  # times that Redis went away, or forgot us


def load_layout(slots: int) -> Layout:
    counters = tuple(column.name for column in CounterColumn)
    return Layout(
        LOAD,
        1,
        [
            Block("cells", (len(Cell),), labels=tuple(cell.name for cell in Cell)),
            Block("events", (len(SchedulerEvent),), labels=tuple(event.name for event in SchedulerEvent)),
            Block("sequence", (slots,)),
            Block("values", (len(Column), slots), labels=tuple(column.name for column in Column)),
            Block("queue", (len(QueueColumn), slots), labels=tuple(column.name for column in QueueColumn)),
            Block("base", (len(CounterColumn), slots), labels=counters),
            Block("blobs", (slots, MAX_BLOB_BYTES), "B"),
        ],
    )


def create_table(run_dir: Path, config: Config) -> None:
    """Make the segment in the run directory. Raises SegmentError."""
    Segment.create(run_dir / LOAD, load_layout(config.shm.slots)).close()


def encode(instance: Instance) -> bytes:
    """The blob of `instance`. Raises MetadataTooLarge."""
    blob = msgspec.msgpack.encode(instance)
    if len(blob) > MAX_BLOB_BYTES:
        sizes = {"transfer": len(instance.transfer), "models": len(msgspec.msgpack.encode(instance.models))}
        largest = max(sizes, key=lambda name: sizes[name])
        raise MetadataTooLarge(
            f"the metadata of {instance.url} takes {len(blob)} bytes, {sizes[largest]} of them its {largest}; "
            f"{MAX_BLOB_BYTES} is the limit",
            param=largest,
        )
    return blob


_decoder = msgspec.msgpack.Decoder(Instance)
decode = _decoder.decode
"""A blob's `Instance`; raises msgspec.DecodeError."""
