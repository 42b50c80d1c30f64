"""`GET /health_generate`: every prefill and decode instance is asked for its health now, and nothing is concluded."""

from __future__ import annotations

import asyncio

from broker.config import Manager
from broker.faces import Event
from broker.narrator import Narrator
from broker.scheduler.collect import JOIN_S, Collector
from broker.scheduler.registry import Member, Registry
from broker.types import Role


async def check_pairs(
    registry: Registry, collector: Collector, manager: Manager, narrator: Narrator
) -> list[tuple[Member, bool]]:
    """All at once; one good answer of `health-failure-threshold` is enough, as for a member that is in doubt."""
    members = [member for member in registry if member.instance.role is not Role.MIXED]
    healthy = await asyncio.gather(*(_is_healthy(member, collector, manager) for member in members))
    for member, well in zip(members, healthy, strict=True):
        narrator.tell(Event.ASKED_HEALTHY if well else Event.ASKED_UNHEALTHY, url=member.instance.url)
    return list(zip(members, healthy, strict=True))


async def _is_healthy(member: Member, collector: Collector, manager: Manager) -> bool:
    instance = member.instance
    try:
        async with asyncio.timeout(manager.health_check_timeout_secs + JOIN_S):
            if instance.is_native:
                return await collector.incarnation(instance) == instance.incarnation
            return await collector.is_healthy(instance, manager.health_failure_threshold)
    except TimeoutError:
        return False
