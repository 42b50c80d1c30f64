"""Instances of other hosts, as a frontend uses them: under a lease, for one request each (docs/cluster.md).

    RemoteGrant --enter--> RemoteChoice   open   the same transports, straight to the engine
                              lease       close  -> ended: the scheduler gives the lease back

No slot of the load table is theirs: their load is their own host's to count. But breaker and lease know instances by
slot, so each is given a number beyond the table's, and counters that nobody reads. The numbers are few; the one that
was used last goes to the next newcomer last.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec

from broker import wire
from broker.counters import CounterColumn
from broker.errors import UNDECODABLE
from broker.lease import Lease
from broker.table import decode
from broker.types import Instance
from frontend.breaker import Breaker
from frontend.dispatch import RemoteChoice
from shm.cells import CounterRow

GUESTS = 256
"""Instances of other hosts that a frontend knows at once."""
IDLE_S = 60.0
"""One that has not been used for this long is forgotten, its connections with it."""


@dataclass(slots=True)
class _Guest:
    slot: int
    instance: Instance
    generation: int
    open: int = 0
    """Leases."""
    idle: asyncio.TimerHandle | None = None


class Guests:
    """Who they are, and the leases that requests of this frontend hold there. Owned by its `Admission`."""

    def __init__(
        self,
        first: int,
        breaker: Breaker,
        loop: asyncio.AbstractEventLoop,
        on_end: Callable[[wire.RemoteLease], None],
        forget: Callable[[Instance], None],
    ) -> None:
        """`first` is the number of slots in the table. `on_end` hears of each lease that is over; `forget` of each
        instance that is."""
        self._first = first
        self._breaker = breaker
        self._loop = loop
        self._on_end = on_end
        self._forget = forget
        width = first + GUESTS
        # As wide as the numbers are high; of what lies below them no page is ever touched.
        self._row = CounterRow(memoryview(bytearray(8 * len(CounterColumn) * width)).cast("q"), width)
        self._free = list(range(first + GUESTS - 1, first - 1, -1))
        self._guests: dict[tuple[str, bytes], _Guest] = {}
        self._entered = 0
        self.held: dict[str, wire.RemoteLease] = {}
        """By lease, while its request runs."""

    def __repr__(self) -> str:
        return f"Guests({len(self._guests)}, {len(self.held)} leases)"

    def close(self) -> None:
        for guest in self._guests.values():
            if guest.idle is not None:
                guest.idle.cancel()

    def are_all(self, slots: Collection[int]) -> bool:
        """Whether these are instances of other hosts."""
        return all(slot >= self._first for slot in slots)

    def enter(self, grant: wire.RemoteGrant, now: float) -> RemoteChoice | None:
        """A request goes there; None: it cannot, and the grant is to be returned. `now`: monotonic seconds."""
        try:
            instance = decode(grant.instance)
        except UNDECODABLE:
            return None
        guest = self._guest(instance)
        if guest is None:
            return None
        if guest.slot in self._breaker.open_slots(now):
            self._rest(guest)
            return None
        given = grant.lease
        lease = Lease(self._row, guest.slot, guest.generation, 0)
        self._row.add(CounterColumn.STARTED, guest.slot)
        guest.open += 1
        self._breaker.tries(guest.slot, now)
        self.held[given.lease] = given

        def ended(_slot: int) -> None:
            del self.held[given.lease]
            guest.open -= 1
            self._rest(guest)
            failed = self._breaker.failures(guest.slot) > 0
            self._on_end(msgspec.structs.replace(given, failed=failed))

        lease.on_close = ended
        return RemoteChoice(instance, lease, grant.name)

    def _guest(self, instance: Instance) -> _Guest | None:
        key = instance.url, instance.incarnation
        guest = self._guests.pop(key, None)
        if guest is None:
            if not self._free:
                idle = next((guest for guest in self._guests.values() if not guest.open), None)
                if idle is None:
                    return None
                self._leave(idle)
            self._entered += 1
            guest = _Guest(self._free.pop(), instance, self._entered)
        if guest.idle is not None:
            guest.idle.cancel()
            guest.idle = None
        self._guests[key] = guest  # the last one
        return guest

    def _rest(self, guest: _Guest) -> None:
        if not guest.open:
            guest.idle = self._loop.call_later(IDLE_S, self._leave, guest)

    def _leave(self, guest: _Guest) -> None:
        if guest.idle is not None:
            guest.idle.cancel()
        del self._guests[guest.instance.url, guest.instance.incarnation]
        self._free.append(guest.slot)
        self._forget(guest.instance)
