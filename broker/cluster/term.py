"""One term of this host in the cluster: a task that takes turns with Redis, woken by what happens here and there.

    beat        every second: we live, leases go on, who else is there
    collect     letters: offers to us, places that came back to us
    give back   leases whose requests are over
    publish     what waits here, when it has changed
    survey      while others have work and we have room: plan, offer

Decisions are in `stealing`, `borrowing` and `lending`. What was read before a round trip is looked at again after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time

from broker.cluster import records
from broker.cluster.here import Here, Peer
from broker.cluster.origin import MS, Offered, Origin
from broker.cluster.records import Offer, Returned
from broker.cluster.store import LETTERS, Store
from broker.cluster.thief import Thief

BEAT_S = 1.0


class Term:
    """Owned by the member, from `join` to the first error."""

    def __init__(self, here: Here, store: Store, term: str) -> None:
        self._here = here
        self._store = store
        self._term = term
        self._origin = Origin(here, store, term)
        self._thief = Thief(here, store, term)
        self._awake = asyncio.Event()
        self._letters = True  # some may have come
        self._others = 0
        self._beat_at = 0.0

    def close(self) -> None:
        """After the last turn."""
        self._thief.close()

    def poke(self) -> None:
        """The line has changed, or leases are to be returned."""
        self._origin.changed = True
        self._awake.set()

    def yields(self, slot: int) -> bool:
        """Whether a free place, which one of our own could have, is set aside for one who waits elsewhere."""
        if self._thief.yields(slot):
            self._awake.set()
            return True
        return False

    def wake(self, *, letter: bool) -> None:
        """Somebody has written to us; else somebody has work, or has come."""
        if letter:
            self._letters = True
        else:
            self._thief.heard()
        self._awake.set()

    async def turns(self) -> None:
        """Never returns. Raises StoreAway, TermOver."""
        while True:
            self._awake.clear()
            await self._turn()
            due = [self._beat_at]
            if self._origin.changed and self._others:
                due.append(self._origin.publish_at)
            if self._thief.hungry:
                due.append(self._thief.survey_at)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, min(due) - time.monotonic())):
                    await self._awake.wait()

    async def _turn(self) -> None:
        if time.monotonic() >= self._beat_at:
            await self._beat()
            self._letters = True
        if self._letters:
            await self._collect()
        if self._here.own.returns:
            await self._origin.give_back()
        if self._origin.changed and self._others and time.monotonic() >= self._origin.publish_at:
            await self._origin.publish()
        if self._thief.hungry and time.monotonic() >= self._thief.survey_at:
            await self._thief.survey()

    async def _beat(self) -> None:
        here = self._here
        here.own.prune(here.lives())
        lent = here.lending.leases
        beat = await self._store.beat(self._term, here.own.leases, [(each.lease, each.note) for each in lent])
        self._beat_at = time.monotonic() + BEAT_S
        now_ns = here.clock()
        for each, left_ms in zip(lent, beat.left_ms, strict=True):
            if left_ms > 0:
                here.lending.renewed(each.lease, now_ns + left_ms * MS)
        peers = []
        for member in beat.members:
            record = here.read(records.as_host, member.record)
            load = here.read(records.as_load, member.load) if member.load else records.LoadRecord(0, 0)
            if record is not None and load is not None:
                peers.append(Peer(member.id, record.name, load.tickets, load.tokens))
                self._thief.sets = max(self._thief.sets, min(record.shards, records.MOST_SETS))
        here.met(peers)
        if len(peers) > self._others:
            self._origin.changed = True
        self._others = len(peers)
        if any(peer.tickets >= here.settings.min_load_score for peer in peers):
            self._thief.hungry = True

    async def _collect(self) -> None:
        here = self._here
        self._letters = False
        letters = await self._store.collect(self._term)
        self._letters |= len(letters) >= LETTERS  # others may have come meanwhile
        offers = []
        freed = False
        for data in letters:
            match here.read(records.as_letter, data):
                case Offer() as offer:
                    instance = here.read(records.as_instance, offer.instance)
                    if instance is not None:
                        offers.append(Offered(offer, instance))
                case Returned(lease=lease, used=used, failed=failed):
                    freed |= self._thief.returned(lease, used=used, failed=failed)
        if freed:
            here.sweep()
        if offers:
            await self._origin.answer(offers)
