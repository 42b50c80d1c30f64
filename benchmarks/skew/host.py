"""One Penstock in virtual time: the admission queue as shipped in front of a host's instances."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from benchmarks.routing.engine import TOKENS_PER_S
from benchmarks.skew.workload import Request, Workload
from benchmarks.skew.world import Instance, World
from broker.scheduler.lines import Ticket
from broker.scheduler.queue import AdmissionQueue
from broker.types import Role

POOL = (Role.MIXED, "m")
AGING_NS = 10**10
TOKEN_NS = 1e9 / TOKENS_PER_S
NEVER = 1 << 62


class Host:
    """Scheduling as `local` does it: the instance with the fewest requests, or the line, and idle instances steal from
    busy ones of the same host."""

    def __init__(self, world: World, workload: Workload, instances: int, seed: str) -> None:
        self.world = world
        self.instances = [Instance(world, workload) for _ in range(instances)]
        self.reserved = [0] * instances
        """Places that were offered to other hosts."""
        self.queue = AdmissionQueue(10**9, 10**15, AGING_NS, TOKEN_NS)
        self.yields: Callable[[int], None] = lambda slot: None
        """May set a place in this slot, which own tickets could have, aside for another host's."""
        self.on_change: Callable[[], None] = lambda: None
        """Told after each turn."""
        self._waiting: dict[int, Request] = {}
        self._rng = Random(seed)

    def room(self, slot: int) -> int:
        return self.instances[slot].room - self.reserved[slot]

    def arrive(self, request: Request) -> None:
        rooms = [self.room(slot) for slot in range(len(self.instances))]
        most = max(rooms)
        home = self._rng.choice([slot for slot, room in enumerate(rooms) if room == most])
        if most > 0 and not self._waiting:
            self.run(request, home)
            return
        self._waiting[request.number] = request
        now_ns = self.world.now_ns
        self.queue.offer(Ticket((0, 1, request.number), POOL, home, request.prompt, 1, "", now_ns, NEVER), now_ns)
        self.sweep()

    def run(self, request: Request, slot: int) -> None:
        self.instances[slot].run(request, self.sweep)

    def lend(self, ticket: Ticket) -> Request:
        """Out of the line, and not to an instance of this host."""
        self.queue.lend(ticket.ident)
        return self._waiting.pop(ticket.ident[2])

    def sweep(self) -> None:
        """As the scheduler's: nobody steals what its own instance has room for."""
        for slot in range(len(self.instances)):
            if self.room(slot) > 0:
                self.yields(slot)
        for steal in (False, True):
            for slot in range(len(self.instances)):
                while self.room(slot) > 0:
                    grant = self.queue.grant(slot, (POOL,), self.world.now_ns, steal=steal)
                    if grant is None:
                        break
                    self.run(self._waiting.pop(grant.ticket.ident[2]), slot)
        self.on_change()
