"""This host as a member of the cluster, from term to term.

    connect --> join --> turns (`Term`) --> Redis away, or it forgot us --> alone, for a while --> connect

Alone, the host schedules for itself as if there were no cluster. What it told Redis is void with its term, and said
again in the next one. Requests that run at other hosts go on running; places that were lent come free when their leases
end by our own clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import replace

from broker.cluster import records
from broker.cluster.here import Here, Peer
from broker.cluster.origin import MS
from broker.cluster.records import ForeignRecord
from broker.cluster.store import Store, StoreAway, TermOver
from broker.cluster.term import Term
from broker.table import Cell, ClusterState, SchedulerEvent

logger = logging.getLogger("scheduler.cluster")

RETRY_S = (0.2, 5.0)
"""First and longest rest before Redis is tried again."""
LOOK_S = 0.5
"""How often leases are looked at that nobody renews."""
LEAVE_S = 1.0


class Member:
    """Owned by the scheduler, everything on its loop's thread: `run` until it is cancelled."""

    def __init__(self, here: Here, cells: memoryview) -> None:
        """`cells` of the table, writable. `here.met` is the member's to set."""
        self._here = replace(here, met=self._met)
        self._cells = cells
        self._term: Term | None = None
        self.peers: list[Peer] = []
        self.away_because = "not connected yet"
        self._record = records.encode(
            records.HostRecord(here.machine, here.name, min(here.settings.load_shards_num, records.MOST_SETS))
        )
        self._show(ClusterState.AWAY)

    def __repr__(self) -> str:
        state = f"{len(self.peers)} others" if self._term else f"away: {self.away_because}"
        return f"Member({self._here.name}, {state}, {self._here.own!r}, {self._here.lending!r})"

    def poke(self) -> None:
        """The line has changed, or leases are to be returned."""
        if self._term is not None:
            self._term.poke()

    def yields(self, slot: int) -> bool:
        """Whether a place of ours is set aside for one who waits elsewhere, and has for much longer."""
        return self._term is not None and self._term.yields(slot)

    def status(self) -> dict[str, object]:
        """For people."""
        joined = self._term is not None
        return {
            "state": "joined" if joined else "away",
            "reason": "" if joined else self.away_because,
            "topic": self._here.settings.topic,
            "name": self._here.name,
            "id": self._here.id,
            "lent": len(self._here.lending),
            "borrowed": len(self._here.own.leases),
            "hosts": [peer._asdict() for peer in self.peers],
        }

    async def run(self) -> None:
        """Never returns."""
        expiring = asyncio.get_running_loop().create_task(self._expire())
        try:
            rest = RETRY_S[0]
            while True:
                began = time.monotonic()
                await self._one_term()
                if time.monotonic() - began > RETRY_S[1]:
                    rest = RETRY_S[0]
                await asyncio.sleep(rest)
                rest = min(RETRY_S[1], 2 * rest)
        finally:
            expiring.cancel()
            await asyncio.gather(expiring, return_exceptions=True)

    async def _one_term(self) -> None:
        here = self._here
        store = Store(here.settings, here.id, lambda: here.count(SchedulerEvent.CLUSTER_ROUND_TRIPS, 1))
        name = secrets.token_hex(8)
        try:
            await self._join(store, name)
        except StoreAway as e:
            self._alone(str(e))
            await store.close()
            return
        term = self._term = Term(here, store, name)
        self._show(ClusterState.JOINED)
        logger.info("joined the cluster %r as %s", here.settings.topic, here.name)
        tasks = [asyncio.create_task(self._listen(store, term)), asyncio.create_task(term.turns())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await next(iter(done))
        except StoreAway as e:
            self._alone(str(e))
        except TermOver:
            self._alone("Redis does not know this host any more")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            term.close()
            if self._term is not None:  # cancelled: this host leaves in order
                with contextlib.suppress(StoreAway, TimeoutError):
                    async with asyncio.timeout(LEAVE_S):
                        await store.leave(name)
            await store.close()

    async def _join(self, store: Store, name: str) -> None:
        here = self._here
        kept = await store.join(name, self._record)
        here.own.forget_published()
        now_ns = time.monotonic_ns()
        known = {lent.lease for lent in here.lending.leases}
        for lease, note, left_ms in kept:
            if lease not in known:
                try:
                    here.lending.restore(lease, note, now_ns + left_ms * MS)
                except ForeignRecord:
                    here.count(SchedulerEvent.CLUSTER_IGNORED, 1)
        here.lending.show_all()

    @staticmethod
    async def _listen(store: Store, term: Term) -> None:
        async for letter in store.bells():
            term.wake(letter=letter)

    def _alone(self, why: str) -> None:
        here = self._here
        if self._term is not None or why != self.away_because:
            logger.warning("going on alone: %s", why)
        if self._term is not None:
            here.count(SchedulerEvent.CLUSTER_LOST, 1)
        self._term, self.peers, self.away_because = None, [], why
        self._show(ClusterState.AWAY)
        now_ns = time.monotonic_ns()
        for ticket in here.own.refused_all():
            here.line.put_back(ticket, now_ns)
        here.sweep()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if expired := self._here.lending.expire(time.monotonic_ns()):
                self._here.count(SchedulerEvent.CLUSTER_EXPIRED, expired)
                self._here.sweep()

    def _met(self, peers: list[Peer]) -> None:
        self.peers = peers
        self._show(ClusterState.JOINED)

    def _show(self, state: ClusterState) -> None:
        self._cells[Cell.CLUSTER] = state
        self._cells[Cell.HOSTS] = len(self.peers) + 1 if state is ClusterState.JOINED else 0
