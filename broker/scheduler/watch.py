"""Questions that come due: health checks, models, `/metrics`. Starts them, hands their answers to the registry."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec

from broker import policies
from broker.config import Config
from broker.engines.pd.mooncake import asks_engine_ids, with_engine_ids
from broker.errors import PenstockError
from broker.faces import Event, face_of
from broker.narrator import Narrator
from broker.scheduler.collect import Collector, Errands
from broker.scheduler.registry import SECOND_NS, Member, Registry
from broker.scheduler.tally import Tally
from broker.table import SchedulerEvent
from broker.types import Instance

logger = logging.getLogger("scheduler")

MODELS_EVERY = 6
"""Models that were found by asking are asked for again with every so many-th health check (adapters come and go)."""


class Watch:
    """Owner of the running questions; `close` ends them."""

    def __init__(
        self,
        registry: Registry,
        collector: Collector,
        tally: Tally,
        config: Config,
        on_removed: Callable[[Member], None] = lambda _: None,
    ) -> None:
        """`on_removed` hears of members that failed their last health check."""
        face = face_of(config)
        self._registry = registry
        self._collector = collector
        self._tally = tally
        self._on_removed = on_removed
        self._narrator = Narrator(face, "scheduler")
        self._polls = face.polls_unread or policies.read_reports(config.scheduler)
        self._poll_ns = int(config.manager.metrics_interval_secs * SECOND_NS)
        self._errands = Errands()

    def turn(self, now_ns: int) -> None:
        """Starts what is due; an engine that still owes the last answer is not asked again."""
        for member in self._registry.due(now_ns):
            self._errands.start(("health of", member.instance.url), self._check(member))
        for member in self._registry:
            if self._polls and now_ns >= member.poll_ns and member.instance.metrics_url and member.healthy:
                # The first time is put off by the slot, so that a fleet is not polled in one burst.
                wait = self._poll_ns if member.poll_ns else self._poll_ns * (member.slot % 16) // 16
                member.poll_ns = now_ns + wait
                self._errands.start(("load of", member.instance.url), self._poll(member))

    async def close(self) -> None:
        await self._errands.close()

    async def _check(self, member: Member) -> None:
        instance = member.instance
        if instance.is_native:
            incarnation = await self._collector.incarnation(instance)
            healthy = incarnation == instance.incarnation
            if incarnation is not None and not healthy:
                self._renew(member, msgspec.structs.replace(instance, incarnation=incarnation))
                return
        else:
            healthy = await self._collector.is_healthy(instance)
        if not healthy:
            self._tally.add(SchedulerEvent.HEALTH_CHECKS_FAILED)
        changed = self._registry.probed(member, healthy, time.monotonic_ns())
        if changed:
            self._tell_change(member)
        member.checks += 1
        if healthy and asks_engine_ids(member.instance):
            renewed = with_engine_ids(member.instance, await self._collector.engine_ids(member.instance))
            if renewed is not member.instance:
                self._renew(member, renewed)
        if healthy and member.instance.asks_models and (changed or member.checks % MODELS_EVERY == 0):
            models = await self._collector.models(instance)
            if models and models != member.instance.models:
                self._renew(member, msgspec.structs.replace(member.instance, models=models))

    def _tell_change(self, member: Member) -> None:
        url, role = member.instance.url, member.instance.role.name.lower()
        if self._is_member(member):
            self._narrator.tell(Event.HEALTH_CHANGED, url=url, state=member.state.name)
        else:
            self._narrator.tell(Event.REMOVED, url=url, role=role)
            self._on_removed(member)

    async def _poll(self, member: Member) -> None:
        report = await self._collector.load(member.instance)
        if report is None:
            self._tally.add(SchedulerEvent.POLLS_FAILED)
            self._narrator.tell(Event.POLL_FAILED, url=member.instance.url)
        elif self._is_member(member):
            self._registry.load(member.instance.url, report, time.monotonic_ns())

    def _renew(self, member: Member, instance: Instance) -> None:
        if self._is_member(member):
            try:
                self._registry.register(instance, time.monotonic_ns())
            except PenstockError as e:
                logger.error("%s: %s", member.instance.url, e.message)

    def _is_member(self, member: Member) -> bool:
        """It is still the one that was asked about: others may have come to its URL meanwhile."""
        return self._registry.get(member.instance.url) is member
