"""Whether sessions go where they went before: what FastDeploy's router calls its cache hit rate."""

from __future__ import annotations

from collections import OrderedDict

from broker.config import Scheduler
from broker.counters import FrontendCounters, TotalColumn
from broker.policies import INDEXED
from broker.types import Role

REMEMBERED = 65_536
"""Sessions; the one that was asked for longest ago is forgotten first."""


def by_role(scheduler: Scheduler, counters: FrontendCounters) -> dict[Role, Sessions]:
    """One memory for all roles whose policy looks prompts up; the others have none."""
    sessions = Sessions(counters)
    names = {
        Role.MIXED: scheduler.policy,
        Role.PREFILL: scheduler.prefill_policy,
        Role.DECODE: scheduler.decode_policy,
    }
    return {role: sessions for role, name in names.items() if name in INDEXED}


class Sessions:
    """Each session's last instance. Owned by the frontend's dispatcher."""

    def __init__(self, counters: FrontendCounters) -> None:
        self._counters = counters
        self._last: OrderedDict[int, str] = OrderedDict()
        """By the hash of its name: clients choose that, and it may be as long as a body."""

    def chosen(self, session: str, url: str) -> None:
        self._counters.count(TotalColumn.SESSION_CHOICES)
        key = hash(session)
        if self._last.pop(key, None) == url:
            self._counters.count(TotalColumn.SESSION_REPEATS)
        self._last[key] = url
        if len(self._last) > REMEMBERED:
            self._last.popitem(last=False)
