"""Registration by `POST /register` and by register.yaml: parse, probe, admit, answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import yaml

from broker.config import UNUSABLE_YAML, Config
from broker.errors import PenstockError, Unhealthy
from broker.faces import PENSTOCK, Event, face_of
from broker.narrator import Narrator
from broker.scheduler.collect import Collector
from broker.scheduler.fields import parse, parse_body
from broker.scheduler.registration import Registration
from broker.scheduler.registry import Member, Registry
from broker.scheduler.tally import Tally
from broker.table import SchedulerEvent

MOST_AT_ONCE = 1024
"""Newcomers being probed; more are told to come again, which engines do by themselves."""
MOST_IN_TURN = 4
"""Registrations of one URL: the one that is being probed, and those that wait for it."""


class Busy(PenstockError):
    """Too many newcomers are being probed."""

    status = 503
    kind = "service_unavailable"
    code = "busy"
    retry_after_s = 5


class Turn:
    """A URL whose registration is under way."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.wanted = 0


class Registrar:
    """Owner of the registrations under way."""

    def __init__(self, registry: Registry, collector: Collector, tally: Tally, config: Config) -> None:
        self._registry = registry
        self._collector = collector
        self._tally = tally
        self._face = face_of(config)
        self._narrator = Narrator(self._face, "scheduler")
        self._splitwise = config.server.splitwise
        self._path = config.manager.register_path
        self._retry_s = config.manager.health_check_interval_secs
        self._turns: dict[str, Turn] = {}

    async def answer(self, body: bytes) -> tuple[int, bytes]:
        """Status and JSON body for the body of a `POST /register`."""
        face = self._face
        try:
            await self.register(parse_body(body, self._splitwise, comma_lists=face.takes_comma_lists))
        except PenstockError as e:
            self._tally.add(SchedulerEvent.REGISTRATIONS_REFUSED)
            self._narrator.tell(Event.NOT_REGISTERED, error=face.reason(e))
            status, _, said = face.refused(e)
            return status, said
        self._tally.add(SchedulerEvent.REGISTRATIONS)
        return face.registered.status, face.registered.body

    async def register(self, registration: Registration, *, quiet: bool = False) -> Member:
        """Every frontend sees the instance when this returns. `quiet`: that it does not answer is known.

        A healthy member that registers again, as engines do every few seconds, is not asked for more than its health,
        and only if the face wants that; unless it leaves open what it said before. Two registrations of one URL take
        turns, so that the later one stands.
        Raises Unhealthy, TableFull, MetadataTooLarge, Busy.
        """
        registration = registration.taken_as(self._face.kind_unasked)
        url = registration.instance.url
        async with self._turn(url):
            member = self._registry.get(url)
            known = member.instance if member is not None and member.healthy else None
            instance = registration.rejoined(known) if known is not None else None
            if instance is None:
                instance = await self._collector.join(registration, quiet=quiet)
            elif self._face.probes_members and not await self._collector.stays_healthy(instance):
                raise Unhealthy(f"{url} is not healthy", url=url)
            joined = self._registry.register(instance, time.monotonic_ns())
        if joined is not member:
            self._narrator.tell(
                Event.REGISTERED,
                url=url,
                engine=instance.engine,
                role=instance.role.name.lower(),
                models=", ".join(instance.models) or "any",
            )
        return joined

    @contextlib.asynccontextmanager
    async def _turn(self, url: str) -> AsyncIterator[None]:
        """One registration of a URL at a time. Raises Busy."""
        turn = self._turns.get(url)
        if turn is None:
            if len(self._turns) >= MOST_AT_ONCE and self._registry.get(url) is None:
                raise Busy(f"{MOST_AT_ONCE} instances are being probed")
            turn = self._turns[url] = Turn()
        if turn.wanted >= MOST_IN_TURN:
            raise Busy(f"{url} is being probed for those who registered it before")
        turn.wanted += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.wanted -= 1
            if not turn.wanted:
                del self._turns[url]

    async def configured(self, passed: Callable[[], None]) -> None:
        """register.yaml, for ever: a first pass over all entries, `passed()`, then again what is not registered."""
        entries, unusable = (
            read_entries(Path(self._path), self._splitwise, self._face.reason) if self._path else ([], [])
        )
        for entry in unusable:
            self._narrator.tell(
                entry.event, index=entry.place, problem=entry.problem, where=entry.where, path=self._path
            )
        if self._path and not entries and not unusable:
            self._narrator.tell(Event.LISTED_NONE, path=self._path)
        said: dict[str, str] = {}
        first = True
        while True:
            missing = [each for each in entries if first or self._registry.get(each.instance.url) is None]
            await asyncio.gather(*(self._try(entry, said) for entry in missing))
            if first:
                first = False
                passed()
            await asyncio.sleep(self._retry_s)

    async def _try(self, entry: Registration, said: dict[str, str]) -> None:
        url = entry.instance.url
        try:
            await self.register(entry, quiet=url in said)
            said.pop(url, None)
            self._narrator.tell(Event.LISTED_REGISTERED, index=entry.index, url=url)
        except PenstockError as e:
            if said.get(url) != e.message:  # tried again for ever: said once
                said[url] = e.message
                self._narrator.tell(
                    Event.LISTED_NOT_REGISTERED, index=entry.index, url=url, path=self._path, error=self._face.reason(e)
                )


class Unusable(NamedTuple):
    """What of a register.yaml cannot be used."""

    where: str
    problem: str
    place: int = -1
    """Of an entry; -1 = it is the whole file."""
    event: Event = Event.LISTED_UNUSABLE


def read_entries(
    path: Path, splitwise: bool, reason: Callable[[PenstockError], str] = PENSTOCK.reason
) -> tuple[list[Registration], list[Unusable]]:
    """The instances that a register.yaml lists, and what in it cannot be used, in the words of `reason`."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        return [], [Unusable(str(path), str(e), event=Event.LIST_UNREADABLE)]
    except UNUSABLE_YAML as e:
        return [], [Unusable(str(path), str(e), event=Event.LIST_MALFORMED)]
    listed = (tree.get("instances") or []) if isinstance(tree, dict) else tree or []
    if not isinstance(listed, list) or listed is tree:
        return [], [Unusable(str(path), "`instances` must be a list", event=Event.LIST_MALFORMED)]
    entries, unusable = [], []
    for index, fields in enumerate(listed):
        try:
            entries.append(msgspec.structs.replace(parse(fields, splitwise), index=index))
        except PenstockError as e:
            unusable.append(Unusable(f"{path}: instances[{index}]", reason(e), index))
    return entries, unusable


def answer(status: int, text: str, **more: object) -> tuple[int, bytes]:
    """FastDeploy's form, `code` and `msg`."""
    return status, msgspec.json.encode({"code": status, "msg": text, **more})
