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
AGAIN_S = 0.05


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
        """Never returns. Cancelled, it leaves the cluster in order."""
        stop = asyncio.Event()
        tasks = [asyncio.create_task(self._live(stop)), asyncio.create_task(self._expire())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await next(iter(done))  # neither ever returns: this raises
        finally:
            stop.set()
            tasks[1].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _live(self, stop: asyncio.Event) -> None:
        """From term to term. It is told to stop, not cancelled: see `_ended`."""
        rest = RETRY_S[0]
        while not stop.is_set():
            began = time.monotonic()
            await self._one_term(stop)
            rest = RETRY_S[0] if time.monotonic() - began > RETRY_S[1] else min(RETRY_S[1], 2 * rest)
            await _set_within(stop, rest)

    async def _one_term(self, stop: asyncio.Event) -> None:
        here = self._here
        store = Store(here.settings, here.id, lambda: here.count(SchedulerEvent.CLUSTER_ROUND_TRIPS, 1))
        name = secrets.token_hex(8)
        try:
            await self._join(store, name)
            term = self._term = Term(here, store, name)
            try:
                self._show(ClusterState.JOINED)
                logger.info("joined the cluster %r as %s", here.settings.topic, here.name)
                await self._until(stop, term, store)
            finally:
                term.close()
            with contextlib.suppress(StoreAway):
                await store.leave(name)
        except StoreAway as e:
            self._alone(str(e))
        except TermOver:
            self._alone("Redis does not know this host any more")
        finally:
            await store.close()

    async def _until(self, stop: asyncio.Event, term: Term, store: Store) -> None:
        """The turns of a term, until it is over: then this raises, or told to stop."""
        tasks = [asyncio.create_task(each) for each in (self._listen(store, term), term.turns())]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            await _ended(tasks)
        # Both may have failed: asked for all, or the second one is reported as never asked for.
        for error in [task.exception() for task in tasks if not task.cancelled()]:
            if error is not None:
                raise error

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


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    """Until it is set, or the time is over."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


async def _ended(tasks: list[asyncio.Task[None]]) -> None:
    """Cancels them until they have ended.

    Once is not enough: redis-py looks at a connection under a timeout of 0 before each command, and Python 3.11 takes a
    cancellation that comes just before such a timeout for the timeout.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=AGAIN_S)
