"""One request in line, and what gives it its place there."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from broker import wire
from broker.route import RouteRequest
from frontend.upstream.base import Headers
from frontend.waiting import Waiter

PRIORITY = b"x-penstock-priority"
PRIORITIES = {b"high": 0, b"normal": 1, b"low": 2}
"""Values of that header; any other is as good as none."""
MOST_MODEL = 512
"""Characters of a model's name that a ticket carries. Longer ones are nobody's, whatever follows."""


@dataclass(slots=True, eq=False)
class Waiting:
    """Its owner is whoever waits, who calls `leave` at the end, whatever happened."""

    number: int
    route: RouteRequest
    home: int
    """The slot that the policy preferred."""
    waiter: Waiter
    key: str
    priority: int
    cached: Mapping[int, int]
    """Tokens of its prompt that instances have cached, by slot."""
    since_ns: int
    """Its place in line, monotonic."""
    abroad: bool
    """An instance of another host will do."""
    on_leave: Callable[[Waiting], None]
    deadline: asyncio.TimerHandle | None = field(default=None, repr=False)

    def leave(self) -> None:
        """Idempotent."""
        self.on_leave(self)

    def ticket(self, timeout_ns: int) -> wire.Ticket:
        route = self.route
        return wire.Ticket(
            self.number,
            route.role,
            route.model[:MOST_MODEL] if route.model is not None else None,
            max(1, route.prompt_tokens),
            self.home,
            self.priority,
            self.key,
            self.since_ns,
            self.since_ns + timeout_ns,
            dict(self.cached),
            self.abroad,
        )


def standing(headers: Headers, fairness_header: bytes) -> tuple[str, int]:
    """Fairness key and priority. The key is a digest: what tells clients apart may be their secret."""
    key, priority = b"", PRIORITIES[b"normal"]
    for name, value in headers:
        if name == fairness_header:
            key = value
        elif name == PRIORITY:
            priority = PRIORITIES.get(value.strip().lower(), priority)
    return hashlib.blake2b(key, digest_size=8).hexdigest() if key else "", priority
