"""Redis as the cluster uses it: one method, one round trip. Nothing is decided here.

    penstock:<topic>:
      host:<id>              hash    term, record, load                          lease of the host
      members                zset    id -> Redis' time of its last beat
      load:<k>               zset    id -> tickets that wait there; k by the id
      tickets:<id>:<term>    hash    field -> "<Redis' time when it began to wait> <record>"
      claims:<id>:<term>     hash    field -> lease of the offer that was first
      inbox:<id>:<term>      list    letters
      lent:<id>              hash    lease -> the thief's note about it
      lease:<lease>          string  "offered" by the thief, or "taken" by the origin
      bell, wake:<id>        channels: somebody has tickets; a letter has come

A field is `<ident>:<version>` of a ticket. A key that names a term is void with it: that is the fence. Channels only
wake; what matters lies in keys, and is looked for at every beat as well.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from broker.cluster import scripts
from broker.cluster.records import WINDOW
from broker.config import Scheduler

HOST_LEASE_MS = 5_000
LEASE_MS = 5_000
"""Renewed at every beat while the request runs."""
OFFER_MS = 2_000
"""What an origin gets to accept an offer."""
FORGOTTEN_MS = 30_000
"""A host that has not beaten for this long is no member; what a thief has lent is remembered this long."""
OLDEST = (5, 0)
"""The first Redis whose scripts may read the time and write."""
ANSWER_S = 1.0
"""A Redis that takes longer is away."""
MEMBERS = 256
SURVEYED = 8
"""Hosts looked at per survey and set, those with the most tickets first."""
LETTERS = 256
"""Read at once."""
MOST_LETTERS = 4096
"""In one inbox; further offers are refused."""


class StoreAway(Exception):
    """Redis cannot be used now; the text says why, and names the address but no password."""


class TermOver(Exception):
    """Redis does not know this term of ours: it came back empty, or we were silent for too long."""


class Told(NamedTuple):
    """A ticket to be published."""

    field: str
    waited_ms: int
    record: bytes


class Proposal(NamedTuple):
    """An offer to be made."""

    origin: str
    its_term: str
    field: str
    lease: str
    note: bytes
    letter: bytes


class Listed(NamedTuple):
    """A member."""

    id: str
    record: bytes
    load: bytes


class Surveyed(NamedTuple):
    id: str
    term: str
    record: bytes
    load: bytes
    tickets: dict[str, tuple[int, bytes]]
    """By field: ms waited, and the record."""
    claimed: frozenset[str]
    foreign: int
    """Entries that could not be read."""


class Beat(NamedTuple):
    left_ms: list[int]
    """Of each lent lease, in the order asked for; at most 0: it is over."""
    members: list[Listed]


class Store:
    """One host's connection. Its owner calls one method at a time; `bells` runs beside them."""

    def __init__(self, settings: Scheduler, host: str, on_trip: Callable[[], None] = lambda: None) -> None:
        """`host` is this host's id; `on_trip` hears of each round trip. Nothing is connected yet."""
        self._on_trip = on_trip
        self._prefix = f"penstock:{settings.topic}:"
        self._id = host
        self._shards = settings.load_shards_num
        self._where = f"Redis at {settings.host}:{settings.port}, db {settings.db}"
        self._client = _client(settings, ANSWER_S)
        self._listening = _client(settings, None)  # silence is what its channels mostly say
        self._steps = {name: self._client.register_script(text) for name, text in scripts.sources().items()}

    def __repr__(self) -> str:
        return f"Store({self._where}, {self._prefix}*, host {self._id})"

    async def close(self) -> None:
        await self._client.aclose()
        await self._listening.aclose()

    async def probe(self) -> None:
        """Raises StoreAway when nothing of what follows could work."""
        said = await self._sent(self._client.info("server"))
        version = str(said.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
            raise StoreAway(f"{self._where}: it is Redis {version}; {'.'.join(map(str, OLDEST))} or later is needed")

    # -- terms ---------------------------------------------------------------------------------------------

    async def join(self, term: str, record: bytes) -> list[tuple[str, bytes, int]]:
        """Begins a term. Returns what this host had lent before and is in use: lease, note, ms left."""
        kept = await self._run(
            "join", [*self._own("host"), *self._shared("lent")], [self._prefix, self._id, term, record, HOST_LEASE_MS]
        )
        return [(_text(kept[i]), kept[i + 1], kept[i + 2]) for i in range(0, len(kept), 3)]

    async def leave(self, term: str) -> None:
        await self._run("leave", self._own("host"), [self._prefix, self._id, term])

    async def beat(self, term: str, held: Sequence[str], lent: Sequence[tuple[str, bytes]]) -> Beat:
        """`held`: leases to renew; `lent`: leases and notes of what we lend. Raises TermOver."""
        left, found = await self._in_term(
            "beat",
            [*self._own("host"), *self._shared("lent")],
            [
                self._prefix,
                self._id,
                term,
                HOST_LEASE_MS,
                LEASE_MS,
                FORGOTTEN_MS,
                MEMBERS,
                len(held),
                *held,
                len(lent),
                *(part for each in lent for part in each),
            ],
        )
        members = [Listed(_text(found[i]), found[i + 1], found[i + 2]) for i in range(0, len(found), 3)]
        return Beat(left, members)

    # -- what waits ----------------------------------------------------------------------------------------

    async def publish(
        self, term: str, tickets: int, load: bytes, gone: Sequence[str], new: Sequence[Told], *, ring: bool
    ) -> None:
        """`tickets` wait in all; `gone` and `new` change what is seen of them. `ring` wakes the thieves.

        Raises TermOver.
        """
        keys = [self._key("host", self._id), self._load(self._id)]
        keys += [self._key(kind, self._id, term) for kind in ("tickets", "claims")]
        arguments = [self._prefix, self._id, term, HOST_LEASE_MS, tickets, load, int(ring), len(gone), *gone]
        if not await self._run("publish", keys, [*arguments, *(part for ticket in new for part in ticket)]):
            raise TermOver

    async def survey(self, least: int, sets: Sequence[int]) -> list[Surveyed]:
        """Hosts at which at least that many tickets wait, by the sorted sets with these numbers."""
        keys = [f"{self._prefix}load:{number}" for number in sets]
        now_ms, hosts = await self._run("survey", keys, [self._prefix, self._id, least, SURVEYED])
        return [_surveyed(host, now_ms) for host in hosts]

    # -- offers and leases ---------------------------------------------------------------------------------

    async def offer(self, term: str, proposals: Sequence[Proposal]) -> list[int]:
        """For each what `offer.lua` says. Raises TermOver."""
        own = [self._key("host", self._id), self._key("lent", self._id)]
        limits: list[int] = [MOST_LETTERS, FORGOTTEN_MS, HOST_LEASE_MS]
        async with self._client.pipeline(transaction=False) as pipeline:
            for origin, its_term, field, lease, note, letter in proposals:
                keys = [*own, self._key("host", origin)]
                keys += [self._key(kind, origin, its_term) for kind in ("tickets", "claims", "inbox")]
                keys += [self._key("lease", lease)]
                named: list[str | bytes | int] = [self._prefix, term, origin, its_term, field, lease, note]
                await self._steps["offer"](keys, [*named, OFFER_MS, letter, *limits], client=pipeline)
            answers: list[int] = await self._sent(pipeline.execute())
        if 3 in answers:
            raise TermOver
        return answers

    async def collect(self, term: str) -> list[bytes]:
        """Raises TermOver."""
        keys = [self._key("host", self._id), self._key("inbox", self._id, term)]
        letters: list[bytes] = await self._in_term("collect", keys, [term, LETTERS])
        return letters

    async def accept(self, term: str, offers: Sequence[tuple[str, str]]) -> list[bool]:
        """Accepts offers (lease, field); True: the lease is ours. Raises TermOver: none is."""
        keys = [self._key("host", self._id), *(self._key(kind, self._id, term) for kind in ("tickets", "claims"))]
        arguments = [self._prefix, term, LEASE_MS, *(part for each in offers for part in each)]
        return [bool(answer) for answer in await self._in_term("accept", keys, arguments)]

    async def give_back(self, leases: Sequence[tuple[str, str, bytes]]) -> None:
        """Returns leases (lease, thief, letter)."""
        arguments: list[str | bytes | int] = [self._prefix, HOST_LEASE_MS, *(part for each in leases for part in each)]
        await self._run("give_back", [], arguments)

    # -- wake-ups ------------------------------------------------------------------------------------------

    async def bells(self) -> AsyncIterator[bool]:
        """Yields when woken: True by a letter, False because somebody has tickets, or came. Until Redis is away."""
        try:
            async with self._listening.pubsub(ignore_subscribe_messages=True) as channels:
                await channels.subscribe(f"{self._prefix}bell", f"{self._prefix}wake:{self._id}")
                yield True  # whatever came before
                while True:
                    message = await channels.get_message(ignore_subscribe_messages=True, timeout=None)
                    if message is not None:
                        yield not message["channel"].endswith(b":bell")
        except (redis.exceptions.RedisError, OSError) as e:
            raise StoreAway(self._explained(e)) from e

    # -- within --------------------------------------------------------------------------------------------

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)

    def _own(self, kind: str) -> list[str]:
        return [self._key(kind, self._id), self._key("members"), self._load(self._id)]

    def _shared(self, kind: str) -> list[str]:
        return [self._key(kind, self._id)]

    def _load(self, host: str) -> str:
        return f"{self._prefix}load:{shard(host, self._shards)}"

    async def _in_term(self, step: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        answer = await self._run(step, keys, arguments)
        if answer is None:
            raise TermOver
        return answer

    async def _run(self, step: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        return await self._sent(self._steps[step](keys, arguments))

    async def _sent(self, command: Any) -> Any:
        self._on_trip()
        try:
            async with asyncio.timeout(2 * ANSWER_S):
                return await command
        except (redis.exceptions.RedisError, OSError) as e:  # TimeoutError is an OSError
            raise StoreAway(self._explained(e)) from e

    def _explained(self, error: Exception) -> str:
        return f"{self._where}: {explained(error)}"


def shard(host: str, shards: int) -> int:
    """The sorted set in which the load of a host is found."""
    return zlib.crc32(host.encode()) % shards


def explained(error: Exception) -> str:
    """What to do about it, where that can be told."""
    text = str(error) or type(error).__name__
    if isinstance(error, redis.exceptions.AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        return f"scheduler.password is wrong or missing ({text})"
    if "DB index" in text:
        return f"scheduler.db does not exist there ({text})"
    if isinstance(error, (redis.exceptions.TimeoutError, TimeoutError)):
        return f"no answer within {ANSWER_S:g} s"
    return text


def _client(settings: Scheduler, answer_s: float | None) -> redis.asyncio.Redis:
    return redis.asyncio.Redis(
        host=settings.host,
        port=settings.port,
        db=settings.db,
        password=settings.password or None,
        socket_timeout=answer_s,
        socket_connect_timeout=ANSWER_S,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),  # a step that may have been done is not done again behind our back
        client_name="penstock",
        protocol=2,
    )


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _surveyed(host: Sequence[Any], now_ms: int) -> Surveyed:
    name, term, record, load, fields, claimed = host
    tickets: dict[str, tuple[int, bytes]] = {}
    foreign = 0
    for i in range(0, min(len(fields), 4 * WINDOW), 2):
        since, _, ticket = fields[i + 1].partition(b" ")
        if since.isdigit() and len(since) < 20:
            tickets[_text(fields[i])] = max(0, now_ms - int(since)), ticket
        else:
            foreign += 1
    return Surveyed(_text(name), _text(term), record, load, tickets, frozenset(map(_text, claimed)), foreign)
