"""The thief's half: which places this host offers to others, who has them, and until when. No Redis; time is passed in.

    offer ----> taken ----> returned           a letter of the origin
      |           +-------> expired            it does not renew: dead, or cut off
      +-> refused, returned (declined), expired

A place that is lent counts in the table (`QueueColumn.LENT`) like one that a local grant has reserved, so frontends and
queue of this host leave it alone. A lease ends here by this host's own clock alone: what Redis says of it only puts the
end off. So the place is free again in time, whether Redis can be asked or not.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from broker.cluster.locality import is_local
from broker.cluster.records import ForeignRecord, Place, decode
from broker.saturation import UNLIMITED, Saturation
from broker.table import Column, QueueColumn, State
from broker.types import Instance, Role
from broker.view import TableReader

MOST_ROOM = 64
"""Places of one instance that are offered at once."""
GRACE_NS = 1_000_000_000
"""A lease lasts this much longer here than in Redis, which its origin believes."""


REST_NS = 5_000_000_000
"""An instance that failed a request of another host is not offered for so long: its own host may not know it yet."""


_NONE: Mapping[int, int] = {}


class Note(msgspec.Struct, frozen=True, array_like=True, tag="note/1"):
    """What the next scheduler of this host must know of a lease."""

    url: str
    generation: int


_as_note = msgspec.msgpack.Decoder(Note)
_encode = msgspec.msgpack.Encoder().encode


@dataclass(slots=True)
class Lent:
    """One place. Owned by `Lending`."""

    lease: str
    slot: int
    generation: int
    url: str
    until_ns: int

    @property
    def note(self) -> bytes:
        return _encode(Note(self.url, self.generation))


class Lending:
    """The one writer of the column LENT. Owned by the scheduler."""

    def __init__(
        self,
        table: TableReader,
        cells: memoryview,
        instance_capacity: int,
        machine: str,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`cells`: the block `queue`, writable. What a predecessor lent counts until `show_all`."""
        self._table = table
        self._cells = cells
        self._slots = len(cells) // len(QueueColumn)
        self._saturation = Saturation(table, instance_capacity, clock)
        self._machine = machine
        self._clock = clock
        self._lent: dict[str, Lent] = {}
        self._rests: dict[tuple[int, int], int] = {}  # until when, by slot and generation
        self._numbers = itertools.count(1)

    def __repr__(self) -> str:
        return f"Lending({len(self._lent)} lent)"

    def __len__(self) -> int:
        return len(self._lent)

    # -- what there is -------------------------------------------------------------------------------------

    def places(self, aside: Mapping[int, int] = _NONE, own_waited_ms: int | None = None) -> list[Place]:
        """Instances that could take requests of other hosts: with room, and none of our own waits for it.

        Where places are set `aside`, by slot, it is those alone, and `own_waited_ms` what they cost our own.
        """
        now_ns = self._clock()
        self._rests = {key: until_ns for key, until_ns in self._rests.items() if until_ns > now_ns}
        found = []
        for entry in self._table.entries():
            slot, instance = entry.slot, entry.instance
            if entry.state is not State.READY or instance.role is not Role.MIXED:
                continue
            if (slot, entry.generation) in self._rests:
                continue
            if aside:
                room = aside.get(slot, 0)
            else:
                room = 0 if self._saturation.is_held(slot) else self._room(slot)
            if room > 0:
                machine = self._machine if is_local(instance.url) else None
                waited_ms = own_waited_ms if aside else None
                found.append(Place(slot, instance.role, instance.models, room, machine, waited_ms))
        return found

    def _room(self, slot: int) -> int:
        room = self._saturation.opening(slot)
        if room < UNLIMITED:
            return min(room, MOST_ROOM)
        # Nobody knows how much it takes, nor how full it is: what is idle can take one.
        busy = self._table.live_at(slot) + self._cell(QueueColumn.RESERVED, slot)
        return 0 if busy or self._cell(QueueColumn.LENT, slot) else 1

    def instance(self, slot: int) -> Instance:
        """Of a place. KeyError: it has left."""
        return self._table.instance(slot)

    # -- a lease's life ------------------------------------------------------------------------------------

    def begin(self, slot: int, term: str, until_ns: int) -> Lent:
        """Sets a place aside, for an offer. KeyError: the instance has left."""
        instance = self._table.instance(slot)
        generation = int(self._table.snapshot[Column.GENERATION, slot])
        lent = Lent(f"{term}.{next(self._numbers)}", slot, generation, instance.url, until_ns + GRACE_NS)
        self._lent[lent.lease] = lent
        self._show(slot)
        return lent

    def end(self, lease: str, *, failed: bool = False) -> bool:
        """Returned, declined or refused; False: it was over before. `failed`: the instance did."""
        lent = self._lent.pop(lease, None)
        if lent is None:
            return False
        if failed:
            self._rests[lent.slot, lent.generation] = self._clock() + REST_NS
        self._show(lent.slot)
        return True

    def renewed(self, lease: str, until_ns: int) -> None:
        """It goes on, as Redis says. It never ends earlier by that."""
        lent = self._lent.get(lease)
        if lent is not None:
            lent.until_ns = max(lent.until_ns, until_ns + GRACE_NS)

    def expire(self, now_ns: int) -> int:
        """Ends what nobody has renewed in time. Returns how many."""
        over = [lent.lease for lent in self._lent.values() if lent.until_ns <= now_ns]
        for lease in over:
            self.end(lease)
        return len(over)

    @property
    def leases(self) -> list[Lent]:
        return list(self._lent.values())

    # -- succession ----------------------------------------------------------------------------------------

    def restore(self, lease: str, note: bytes, until_ns: int) -> None:
        """What a predecessor had lent and is in use. Raises ForeignRecord."""
        said = decode(_as_note, note)
        for entry in self._table.entries():
            if entry.instance.url == said.url and entry.generation == said.generation:
                self._lent[lease] = Lent(lease, entry.slot, entry.generation, said.url, until_ns + GRACE_NS)
                return
        raise ForeignRecord(f"{said.url} is not here any more")

    def show_all(self) -> None:
        """The column as it is: what a predecessor counted there is gone."""
        for slot in range(self._slots):
            self._show(slot)

    # -- within --------------------------------------------------------------------------------------------

    def _show(self, slot: int) -> None:
        # What was lent of an instance that has left the slot counts nowhere.
        count = sum(1 for lent in self._lent.values() if lent.slot == slot and self._table.find(slot, lent.generation))
        if self._cell(QueueColumn.LENT, slot) != count:
            self._cells[QueueColumn.LENT * self._slots + slot] = count

    def _cell(self, column: QueueColumn, slot: int) -> int:
        value: int = self._cells[column * self._slots + slot]
        return value
