"""Registration by `POST /register` and by register.yaml: parse, probe, admit, answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import yaml

from broker.config import Config
from broker.errors import PenstockError
from broker.scheduler.collect import Collector
from broker.scheduler.registration import Registration, parse, parse_body
from broker.scheduler.registry import Member, Registry
from broker.scheduler.tally import Tally
from broker.table import SchedulerEvent

logger = logging.getLogger("scheduler")

MOST_AT_ONCE = 1024
"""Newcomers being probed; more are told to come again, which engines do by themselves."""


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
        self._splitwise = config.server.splitwise
        self._path = config.manager.register_path
        self._retry_s = config.manager.health_check_interval_secs
        self._turns: dict[str, Turn] = {}

    async def answer(self, body: bytes) -> tuple[int, bytes]:
        """Status and JSON body for the body of a `POST /register`."""
        try:
            await self.register(parse_body(body, self._splitwise))
        except PenstockError as e:
            self._tally.add(SchedulerEvent.REGISTRATIONS_REFUSED)
            return refusal(e)
        self._tally.add(SchedulerEvent.REGISTRATIONS)
        return answer(200, "Register success")

    async def register(self, registration: Registration) -> Member:
        """Every frontend sees the instance when this returns.

        A healthy member that registers again is not probed: engines do that every few seconds. Two registrations of
        one URL take turns, so that the later one stands. Raises Unhealthy, TableFull, MetadataTooLarge, Busy.
        """
        url = registration.instance.url
        async with self._turn(url):
            member = self._registry.get(url)
            if member is not None and member.healthy:
                instance = registration.rejoined(member.instance)
            else:
                instance = await self._collector.join(registration)
            asks_models = not registration.names_models and not instance.is_native
            joined = self._registry.register(instance, time.monotonic_ns(), asks_models=asks_models)
        if joined is not member:
            logger.info("registered %s: %s %s %s", url, instance.engine, instance.role.name.lower(), instance.models)
        return joined

    @contextlib.asynccontextmanager
    async def _turn(self, url: str) -> AsyncIterator[None]:
        """One registration of a URL at a time. Raises Busy."""
        turn = self._turns.get(url)
        if turn is None:
            if len(self._turns) >= MOST_AT_ONCE and self._registry.get(url) is None:
                raise Busy(f"{MOST_AT_ONCE} instances are being probed")
            turn = self._turns[url] = Turn()
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
        entries, unusable = read_entries(Path(self._path), self._splitwise) if self._path else ([], [])
        for sentence in unusable:
            logger.error("%s", sentence)
        said: dict[str, str] = {}
        first = True
        while True:
            missing = [e for e in entries if first or self._registry.get(e.instance.url) is None]
            await asyncio.gather(*(self._try(entry, said) for entry in missing))
            if first:
                first = False
                passed()
            await asyncio.sleep(self._retry_s)

    async def _try(self, entry: Registration, said: dict[str, str]) -> None:
        url = entry.instance.url
        try:
            await self.register(entry)
            said.pop(url, None)
        except PenstockError as e:
            if said.get(url) != e.message:  # tried again for ever: said once
                said[url] = e.message
                logger.error("%s of %s is not registered yet: %s", url, self._path, e.message)


def read_entries(path: Path, splitwise: bool) -> tuple[list[Registration], list[str]]:
    """The instances that a register.yaml lists, and a sentence for each thing in it that cannot be used."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as e:
        return [], [f"cannot read {path}: {e}"]
    listed = (tree.get("instances") or []) if isinstance(tree, dict) else tree or []
    if not isinstance(listed, list) or listed is tree:
        return [], [f"{path}: `instances` must be a list"]
    entries, unusable = [], []
    for index, fields in enumerate(listed):
        try:
            entries.append(parse(fields, splitwise))
        except PenstockError as e:
            unusable.append(f"{path}: instances[{index}]: {e.message}")
    return entries, unusable


def answer(status: int, text: str, **more: object) -> tuple[int, bytes]:
    """FastDeploy's form, `code` and `msg`."""
    return status, msgspec.json.encode({"code": status, "msg": text, **more})


def refusal(error: PenstockError) -> tuple[int, bytes]:
    """FastDeploy's form and OpenAI's in one body."""
    said = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return answer(error.status, error.message, error=said)
