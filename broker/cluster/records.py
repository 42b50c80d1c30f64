"""What hosts tell each other through Redis, and its bytes. Pure.

Every record is a msgpack array whose first element names its kind and format. What begins otherwise, or has other
fields, is foreign or of another version: `ForeignRecord`, which the reader counts and passes over.

Nothing here holds a prompt, a token, a key or a moment by a host's clock: times are durations, or Redis' own.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from broker.errors import UNDECODABLE
from broker.types import Instance, Role

WINDOW = 64
"""Tickets that a host publishes: the first in its line."""
MOST_SETS = 1024
"""Sorted sets of load; `scheduler.load-shards-num`."""
MAX_RECORD_BYTES = 16 * 1024
"""Longer ones are not looked at; an instance takes 8 KiB at most."""


class ForeignRecord(Exception):
    """Not written by this version of Penstock."""


# -- what the rule sees ------------------------------------------------------------------------------------


class Place(NamedTuple):
    """An instance of this host that could take requests of others now."""

    slot: int
    role: Role
    models: tuple[str, ...]
    """Empty = every model."""
    room: int
    """Requests that it could take, at least 1."""
    machine: str | None
    """The only machine that can reach it; None: every host can."""
    own_waited_ms: int | None = None
    """How long the next of this host's own tickets that could have it has waited; None: there is none."""


class TicketRecord(NamedTuple):
    """A request that waits at another host."""

    ident: str
    """Unique within its host's term."""
    version: int
    """Rises when it comes back in line after an offer for it was accepted."""
    role: Role
    model: str | None
    """None = any."""
    prompt: int
    """Tokens, at least 1."""
    cached: int
    """Of them in the cache of its home; 0 = none, or not known."""
    priority: int
    """0 is the highest."""
    waited_ms: int
    """At the time of the survey, by Redis' clock."""
    home: int
    """In whose line it stands: a number that only its host understands."""
    pace_ms: float | None
    """Between two tickets that its home takes; None = no experience."""
    claimed: bool
    """Somebody's offer for it is on its way."""


class HostLoad(NamedTuple):
    """A host at which tickets wait, as of one survey."""

    host: str
    term: str
    machine: str
    tickets: int
    """All that wait there."""
    tokens: int
    """What they cost at their homes: tokens of their prompts that are not cached there."""
    line: tuple[TicketRecord, ...]
    """The first of them (`WINDOW` at most), in the order in which they are to be served."""


class Theft(NamedTuple):
    """What the rule decides: the instance in `slot` for that ticket."""

    slot: int
    victim: HostLoad
    ticket: TicketRecord


# -- what lies in Redis ------------------------------------------------------------------------------------

_Natural = Annotated[int, Meta(ge=0)]
_Name = Annotated[str, Meta(min_length=1, max_length=256)]


class HostRecord(msgspec.Struct, frozen=True, array_like=True, tag="host/1"):
    """Who a member is."""

    machine: _Name
    name: _Name
    """For people: host name and port."""
    shards: Annotated[int, Meta(ge=1)]
    """Sorted sets that it knows; hosts with different numbers may not see each other."""


class LoadRecord(msgspec.Struct, frozen=True, array_like=True, tag="load/1"):
    """What waits at a host, and how fast it is served there."""

    tickets: _Natural
    tokens: _Natural
    paces_ms: dict[int, Annotated[float, Meta(ge=0)]] = {}
    """Mean time between two tickets that a home takes, by home; those without experience are missing."""


class Waiting(msgspec.Struct, frozen=True, array_like=True, tag="ticket/1"):
    """A published ticket; its name and version are its field's, its age is beside it."""

    order: int
    """The smallest is served first. Comparable with those of the same host only."""
    role: Role
    model: Annotated[str, Meta(max_length=512)] | None
    prompt: Annotated[int, Meta(ge=1)]
    cached: _Natural
    priority: _Natural
    home: _Natural


class Offer(msgspec.Struct, frozen=True, array_like=True, tag="offer/1"):
    """A place at one of the thief's instances, for one version of one ticket. In the origin's inbox."""

    lease: _Name
    host: _Name
    """The thief."""
    name: _Name
    """The thief's, for people."""
    ident: _Name
    version: _Natural
    instance: bytes
    """`encode_instance`."""


class Returned(msgspec.Struct, frozen=True, array_like=True, tag="returned/1"):
    """The place is free again: the request is over, or the offer was declined. In the thief's inbox."""

    lease: _Name
    used: bool
    """A request ran there."""
    failed: bool = False
    """The instance failed, or could not be reached."""


Letter = Offer | Returned
"""What lies in an inbox."""

T = TypeVar("T")

encode = msgspec.msgpack.Encoder().encode

as_host = msgspec.msgpack.Decoder(HostRecord)
as_load = msgspec.msgpack.Decoder(LoadRecord)
as_waiting = msgspec.msgpack.Decoder(Waiting)
as_letter: msgspec.msgpack.Decoder[Letter] = msgspec.msgpack.Decoder(Letter)
as_instance = msgspec.msgpack.Decoder(Instance)


def decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    """One of the records above. Raises `ForeignRecord` on anything else."""
    if len(data) > MAX_RECORD_BYTES:
        raise ForeignRecord(f"a record of {len(data)} bytes")
    try:
        return decoder.decode(data)
    except UNDECODABLE as e:
        raise ForeignRecord(str(e)) from e


def encode_instance(instance: Instance) -> bytes:
    return encode(instance)
