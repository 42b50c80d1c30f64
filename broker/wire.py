"""Control and engine messages: their types, codec and version. `docs/wire.md` is the protocol for outsiders.

Every message is one frame: a msgpack array `[tag, field, ...]`. Unknown trailing fields are ignored, so a
field may be appended within a version; anything else changes `PROTOCOL`, which the first message of each
conversation carries. Decoding validates: a frame of the wrong shape raises `WireError`, never anything else.

    frontend  <-> scheduler   control.sock   FrontendHello, Register, Drain, RoutingNotices, Tickets
                                             / Welcome, Reply, Grants
    engine    <-> scheduler   engines.sock   EngineHello, EngineBeat, EngineGoodbye  / Accepted, Refused, SchedulerBeat
    engine     -> scheduler   load.sock      [b"load", sequence, Load]               PUB/SUB
    frontend  <-> engine      the engine's   DataHello, Ping, Request (+ body), Abort / DataWelcome, Pong, Step
"""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from broker.errors import UNDECODABLE, WireError
from broker.types import Role

PROTOCOL = 1
"""Version of the engine protocol."""

BEAT_S = 0.5
"""Heartbeats are sent this often, both ways, on every conversation."""
DEAD_AFTER_S = 2.5
"""Silence longer than this ends a peer; with one beat of slack a dead peer is known within 3 s."""

MAX_CONTROL_BYTES = 64 * 1024
"""A control message longer than this is dropped unread."""
MOST_CACHED = 16
"""Instances of which a ticket says what they have of its prompt: it stays small whatever the fleet."""
MAX_REPLY_BYTES = 4 * 1024 * 1024
"""What a frontend takes from its own scheduler: an answer may list thousands of requests."""
MAX_TRANSFER_BYTES = 7 * 1024
"""Opaque transfer metadata; the whole instance must fit 8 KiB of shared memory."""

INCARNATION_BYTES = 16
LOAD_TOPIC = b"load"


# -- frontend -> scheduler ---------------------------------------------------------------------------------


class FrontendHello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Said at start and again whenever the shared epoch has changed."""

    index: int
    life: int
    epoch: int


class Register(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """`POST /register`, body as it came. Answered by a `Reply`."""

    call: int
    body: bytes


class Drain(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """No new requests to the instance (`resume` takes it back). Answered by a `Reply`."""

    call: int
    url: str
    resume: bool = False


class RoutingNotices(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Where prompts were sent, for the prefix index. Not answered, and no harm when lost.

    Notice i: the prompt whose next `lengths[i]` keys (int64, native order) are in `keys` went to `slots[i]`, which had
    `generations[i]` then.
    """

    frontend: int
    last: int
    """Number of the last of these notices; a frontend's notices are numbered in its order."""
    slots: list[int]
    generations: list[int]
    lengths: list[int]
    keys: bytes


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """A request that waits because every candidate is saturated. The request itself stays at its frontend."""

    number: int
    """Unique within the frontend's life."""
    role: Role
    model: str | None
    prompt: int
    """Its tokens, at least 1."""
    home: int
    """The slot that the frontend's policy preferred."""
    priority: int
    """0 is the highest."""
    key: str
    """Fairness key."""
    offered_ns: int
    """When it began to wait (CLOCK_MONOTONIC of this machine): its place in line, however often it is offered."""
    deadline_ns: int
    cached: dict[int, int] = {}
    """Tokens of the prompt that instances had been sent before when it began to wait, by slot; of those with the most,
    `MOST_CACHED`, and of its home."""
    abroad: bool = True
    """An instance of another host will do; not for one that failed there."""


class RemoteLease(msgspec.Struct, frozen=True, array_like=True):
    """A place at an instance of another host (`broker.cluster`)."""

    lease: str
    host: str
    """The id of the host that lends it."""
    failed: bool = False
    """The instance did, or could not be used; said at the end."""


class Tickets(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """What one turn of a frontend's loop has to say to the queue. Everything in it may be said twice."""

    index: int
    life: int
    offered: list[Ticket] = []
    withdrawn: list[int] = []
    """Their clients left; a grant for one of them is given back."""
    taken: list[int] = []
    """Granted, and the lease is in the counters."""
    returned: list[int] = []
    """Granted, but the instance has changed: back to their places."""
    freed: bool = False
    """An instance for which others wait has one request less."""
    complete: bool = True
    """Everything that waits at the frontend has been offered. A new scheduler grants nothing until all say so, as the
    oldest ticket may be the last one to be offered."""
    held: list[RemoteLease] = []
    """Requests run there; said again to a new scheduler, which renews the leases."""
    ended: list[RemoteLease] = []
    """Requests that ran there are over."""


class AbortRequests(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """`POST /v1/abort_requests`, body as it came. Answered by a `Reply`."""

    call: int
    body: bytes


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Answer to `EndRequests`: what was ended here, as (id asked for, tokens its client had got)."""

    ask: int
    requests: list[tuple[str, int]]
    more: bool = False
    """Another message follows."""


class CheckHealth(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """`GET /health_generate`: every prefill and decode instance is asked now. Answered by a `Reply`."""

    call: int


class ShowCluster(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """Who shares with this host (`scheduler.name: global`). Answered by a `Reply`."""

    call: int


class Explain(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """`GET /explain/ID`: why the request went where it went. Answered by a `Reply`."""

    call: int
    ident: str


class Decided(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """Answer to `TellDecisions`: the requests of that name, each as JSON."""

    ask: int
    requests: list[bytes]
    more: bool = False
    """Another message follows."""


# -- scheduler -> frontend ---------------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=16):
    epoch: int


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=17):
    """Answer to the call of that number: an HTTP status and a JSON body."""

    call: int
    status: int
    body: bytes


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """The ticket's request may be sent to the slot, where a place is reserved for it."""

    number: int
    slot: int
    generation: int
    home: int
    """The slot in whose line it stood."""


class RemoteGrant(msgspec.Struct, frozen=True, array_like=True):
    """The ticket's request may be sent to an instance of another host, which keeps a place for it."""

    number: int
    lease: RemoteLease
    name: str
    """The host's, for people."""
    instance: bytes
    """`broker.types.Instance` in msgpack."""
    home: int
    """The slot in whose line it stood."""


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """The queue does not take the ticket: it is full."""

    number: int
    retry_after_s: int
    message: str


class Grants(msgspec.Struct, frozen=True, array_like=True, tag=18):
    """The queue's answers to `Tickets`."""

    granted: list[Grant] = []
    refused: list[Refusal] = []
    lost: list[int] = []
    """Nobody serves them any more: choose again."""
    again: bool = False
    """Grants were not heeded in time; whatever still waits must be offered again."""
    remote: list[RemoteGrant] = []


class EndRequests(msgspec.Struct, frozen=True, array_like=True, tag=19):
    """End these requests (`every`: all), wherever they are, and say which there were by `Ended`."""

    ask: int
    ids: list[str]
    every: bool = False


class TellDecisions(msgspec.Struct, frozen=True, array_like=True, tag=20):
    """Say by `Decided` what is remembered of the request of that name."""

    ask: int
    ident: str


# -- engine -> scheduler -----------------------------------------------------------------------------------


class EngineHello(msgspec.Struct, frozen=True, array_like=True, tag=32):
    """Registration. Said at start and again on a new epoch or on `HelloAgain`; idempotent per incarnation."""

    protocol: int
    incarnation: bytes
    endpoint: str
    """Where the engine's ROUTER is bound, as a frontend must connect to it."""
    role: Role
    models: list[str]
    capacity: int
    """Credit: requests it will run at once; 0 = it does not say."""
    transfer: bytes = b""
    """Opaque transfer metadata, carried unread."""
    name: str = ""
    """What people call it, for lists; of no other meaning."""


class EngineBeat(msgspec.Struct, frozen=True, array_like=True, tag=33):
    """Every `BEAT_S`. `capacity` renews the credit; `ready` false takes the engine out until it is true again."""

    incarnation: bytes
    capacity: int
    ready: bool = True


class EngineGoodbye(msgspec.Struct, frozen=True, array_like=True, tag=34):
    """The engine leaves: no new requests, running ones go on."""

    incarnation: bytes


# -- scheduler -> engine -----------------------------------------------------------------------------------


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=48):
    """Registered: every frontend sees the instance from now on."""

    protocol: int
    epoch: int


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=49):
    """Not registered, and why (bad field, table full, other protocol version)."""

    reason: str


class SchedulerBeat(msgspec.Struct, frozen=True, array_like=True, tag=50):
    """Answer to a beat. Another epoch than the last one: say `EngineHello` again."""

    epoch: int


class HelloAgain(msgspec.Struct, frozen=True, array_like=True, tag=51):
    """Answer to a beat of an incarnation that is not registered."""


# -- frontend -> engine ------------------------------------------------------------------------------------


class DataHello(msgspec.Struct, frozen=True, array_like=True, tag=64):
    """First message on a data connection, and again when the frontend finds a new epoch."""

    protocol: int
    epoch: int


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=65):
    """Every `BEAT_S`; silence for `DEAD_AFTER_S` makes the engine abort the frontend's requests."""


class Request(msgspec.Struct, frozen=True, array_like=True, tag=66):
    """A request; a second frame holds the body as the client sent it."""

    incarnation: bytes
    """Whom it is for: another incarnation answers ERROR and does not run it."""
    id: int
    """Unique within one frontend's life."""
    path: str
    stream: bool
    headers: dict[str, str]
    """The client's headers that matter to an engine, lower-case names."""
    transfer: bytes = b""
    """Transfer metadata of the peer instance in prefill/decode pairs."""


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=67):
    """The client is gone; unknown ids are ignored."""

    ids: list[int]


# -- engine -> frontend ------------------------------------------------------------------------------------


class DataWelcome(msgspec.Struct, frozen=True, array_like=True, tag=80):
    protocol: int
    incarnation: bytes


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=81):
    incarnation: bytes


STEP_TAG: Final = 82
"""`[82, incarnation, [delta, ...]]`: what one engine step produced for one frontend. A delta is
`[id, sequence, kind, data]` with `sequence` counting from 0 per request, and for ERROR a fifth value, the
HTTP status. Deltas are the hot path and are read as plain lists, checked field by field (`read_step`)."""

CHUNK: Final = 0
DONE: Final = 1
ERROR: Final = 2
"""Kinds of delta. CHUNK: bytes for the client as they are (ready-made SSE when streaming). DONE: the last
bytes, possibly none. ERROR: a JSON error body; ends the request."""


class Load(msgspec.Struct, frozen=True, array_like=True, tag="Load"):
    """Published by native engines when a count changed, and every second. -1 = not known."""

    incarnation: bytes
    running: int
    waiting: int
    waiting_tokens: int = -1
    kv_permille: int = -1


FrontendToScheduler = (
    FrontendHello
    | Register
    | Drain
    | RoutingNotices
    | Tickets
    | AbortRequests
    | Ended
    | CheckHealth
    | ShowCluster
    | Explain
    | Decided
)
SchedulerToFrontend = Welcome | Reply | Grants | EndRequests | TellDecisions
EngineToScheduler = EngineHello | EngineBeat | EngineGoodbye
SchedulerToEngine = Accepted | Refused | SchedulerBeat | HelloAgain
FrontendToEngine = DataHello | Ping | Request | Abort
EngineToFrontend = DataWelcome | Pong

T = TypeVar("T")

encode = msgspec.msgpack.Encoder().encode


def decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes | memoryview, limit: int = MAX_CONTROL_BYTES) -> T:
    """One message of the decoder's union. Raises `WireError` on anything else."""
    if len(frame) > limit:
        raise WireError(f"message of {len(frame)} bytes, the limit is {limit}")
    try:
        return decoder.decode(frame)
    except UNDECODABLE as e:
        raise WireError(f"malformed message: {e}") from e


from_frontend = msgspec.msgpack.Decoder(FrontendToScheduler)
to_frontend = msgspec.msgpack.Decoder(SchedulerToFrontend)
from_engine = msgspec.msgpack.Decoder(EngineToScheduler)
to_engine = msgspec.msgpack.Decoder(SchedulerToEngine)
data_to_engine = msgspec.msgpack.Decoder(FrontendToEngine)
data_to_frontend = msgspec.msgpack.Decoder(EngineToFrontend)
load = msgspec.msgpack.Decoder(Load)
