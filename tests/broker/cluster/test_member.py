"""Members of one process over a real Redis: who lends to whom, and what they do without Redis.

The queue is a list here; what the scheduler makes of it is tested in `tests/e2e/test_cluster.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from broker import wire
from broker.cluster import thief
from broker.cluster.borrowing import Borrowing
from broker.cluster.here import Here
from broker.cluster.lending import Lending
from broker.cluster.member import Member
from broker.scheduler.lines import Ident, Ticket
from broker.table import Cell, ClusterState, QueueColumn, SchedulerEvent
from broker.types import Role
from tests.broker.cluster.redis_run import redis, run, settings, shared_redis
from tests.support.redis import RedisServer
from tests.support.table import Run, instance
from tests.support.waiting import eventually

__all__ = ["redis", "shared_redis"]

FAR = "http://10.0.0.{}:8000"


class Host:
    """One member; `waits` is its line, `grants` what it was granted abroad."""

    def __init__(self, path: Path, redis: RedisServer, name: str, machine: str = "one machine", **more: object) -> None:
        path.mkdir()
        self.run = Run(path)
        self.run.reader.now_ns = time.monotonic_ns
        self.name = name
        self.waits: dict[Ident, Ticket] = {}
        self.grants: list[tuple[int, wire.RemoteLease, str, bytes]] = []
        self.events: Counter[SchedulerEvent] = Counter()
        self.sweeps = 0
        self.own = Borrowing()
        self.lending = Lending(self.run.reader, self.run.writer.queue, 0, machine)
        told = settings(redis, **{"min_load_score": 1, **more})
        here = Here(
            settings=told,
            id=f"{name}-id",
            name=name,
            machine=machine,
            line=self,
            own=self.own,
            lending=self.lending,
            count=self._count,
            sweep=self._sweep,
            lives=lambda: [(0, 1)],
        )
        self.member = Member(here, self.run.writer.cells)

    def _count(self, event: SchedulerEvent, number: int) -> None:
        self.events[event] += number

    def _sweep(self) -> None:
        self.sweeps += 1

    # -- the line ------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> tuple[int, int]:
        return len(self.waits), 100 * len(self.waits)

    def front(self, limit: int) -> list[tuple[int, Ticket]]:
        every = sorted(self.waits.values(), key=lambda each: each.offered_ns)
        return [(each.offered_ns, each) for each in every[:limit]]

    def paces_ms(self, slots: set[int]) -> dict[int, float]:
        return dict.fromkeys(slots, 1e6)

    def lend(self, ident: Ident) -> Ticket | None:
        return self.waits.pop(ident, None)

    def grant_abroad(self, ticket: Ticket, lease: wire.RemoteLease, name: str, instance: bytes) -> None:
        self.grants.append((ticket.ident[2], lease, name, instance))
        self.own.taken(ticket.ident)

    # -- the test's side -----------------------------------------------------------------------------------

    def wait(self, *numbers: int, waited_s: float = 0.0, model: str | None = None) -> None:
        now = time.monotonic_ns()
        for number in numbers:
            offered = now - int(waited_s * 1e9) + number
            pool = Role.MIXED, model
            self.waits[0, 1, number] = Ticket((0, 1, number), pool, 0, 10, 1, "", offered, now + 10**12, model=model)
        self.member.poke()

    def admit(self, url: str, capacity: int = 1, *models: str) -> int:
        made = msgspec.structs.replace(instance(url, *models), capacity=capacity)
        return self.run.writer.admit(made, time.monotonic_ns())

    def lent(self) -> int:
        return sum(self.run.writer.queue[QueueColumn.LENT * self.run.writer.slots + slot] for slot in range(8))

    def end(self, place: int = 0) -> None:
        """A request that was granted is over."""
        self.own.ended([self.grants.pop(place)[1]])
        self.member.poke()

    @property
    def state(self) -> tuple[ClusterState, int]:
        return self.run.reader.cluster


@contextlib.asynccontextmanager
async def members(*hosts: Host) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(host.member.run()) for host in hosts]
    try:
        await eventually(
            lambda: all(host.state == (ClusterState.JOINED, len(hosts)) for host in hosts),
            lambda: f"joined: {[host.member for host in hosts]}",
        )
        yield
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in ended), ended


@pytest.fixture
def hosts(tmp_path: Path, redis: RedisServer) -> Iterator[list[Host]]:
    """Busy, idle, and another idle one on another machine."""
    made = [
        Host(tmp_path / "busy", redis, "busy"),
        Host(tmp_path / "idle", redis, "idle"),
        Host(tmp_path / "other", redis, "other", "another machine"),
    ]
    yield made
    for host in made:
        host.run.__exit__()


def test_a_place_goes_to_whoever_is_next_and_comes_back_at_the_end(hosts: list[Host]) -> None:
    async def test() -> None:
        busy, idle, _ = hosts
        slot = idle.admit(FAR.format(1), 2)
        async with members(busy, idle):
            busy.wait(1, 2, 3)
            await eventually(lambda: len(busy.grants) == 2, "two granted")
            assert [number for number, *_ in busy.grants] == [1, 2]
            assert {name for _, _, name, _ in busy.grants} == {"idle"}
            assert (idle.lent(), idle.lending.places()) == (2, [])
            busy.end()
            await eventually(lambda: len(busy.grants) == 2, "the third one")
            assert not busy.waits
            busy.end()
            busy.end()
            await eventually(lambda: idle.lent() == 0, "all places back")
            assert [place.slot for place in idle.lending.places()] == [slot]
        assert idle.events[SchedulerEvent.CLUSTER_LENT] == idle.events[SchedulerEvent.CLUSTER_RETURNED] == 3
        assert busy.own.leases == busy.own.returns == []
        assert busy.state == (ClusterState.JOINED, 2)

    run(test)


def test_instances_on_loopback_are_offered_to_hosts_of_the_same_machine_only(hosts: list[Host]) -> None:
    async def test() -> None:
        busy, idle, other = hosts
        other.admit("http://127.0.0.1:8000", 5)
        async with members(busy, idle, other):
            busy.wait(1, 2)
            await eventually(lambda: other.events[SchedulerEvent.CLUSTER_ROUND_TRIPS] > 6, "it has looked")
            assert other.events[SchedulerEvent.CLUSTER_OFFERED] == 0
            idle.admit("http://127.0.0.1:8000", 1)
            await eventually(lambda: len(busy.grants) == 1, "one granted")
            other.admit(FAR.format(3), 1)
            await eventually(lambda: len(busy.grants) == 2, "both")
            assert [name for _, _, name, _ in busy.grants] == ["idle", "other"]

    run(test)


def test_a_ticket_goes_only_where_its_model_is_served(hosts: list[Host]) -> None:
    async def test() -> None:
        busy, idle, other = hosts
        idle.admit(FAR.format(1), 5, "n")
        async with members(busy, idle, other):
            busy.wait(1, model="m")
            busy.wait(2, model="n")
            await eventually(lambda: len(busy.grants) == 1, "the second one")
            other.admit(FAR.format(3), 1, "m")
            await eventually(lambda: len(busy.grants) == 2, "the first one")
            assert [(number, name) for number, _, name, _ in busy.grants] == [(2, "idle"), (1, "other")]

    run(test)


def test_few_that_wait_are_left_alone(tmp_path: Path, redis: RedisServer) -> None:
    async def test() -> None:
        busy = Host(tmp_path / "busy", redis, "busy", min_load_score=3)
        idle = Host(tmp_path / "idle", redis, "idle", min_load_score=3)
        idle.admit(FAR.format(1), 5)
        async with members(busy, idle):
            busy.wait(1, 2)
            surveys = idle.events[SchedulerEvent.CLUSTER_ROUND_TRIPS] + 5
            await eventually(lambda: idle.events[SchedulerEvent.CLUSTER_ROUND_TRIPS] > surveys, "it has looked")
            assert not busy.grants
            busy.wait(3)
            await eventually(lambda: busy.grants, "help")
            assert len(busy.waits) == 2
        busy.run.__exit__()
        idle.run.__exit__()

    run(test)


def test_two_thieves_never_get_one_ticket_and_waste_no_place(hosts: list[Host]) -> None:
    async def test() -> None:
        busy, idle, other = hosts
        idle.admit(FAR.format(1), 20)
        other.admit(FAR.format(2), 20)
        async with members(busy, idle, other):
            busy.wait(*range(1, 31))
            await eventually(lambda: len(busy.grants) == 30, lambda: f"all; {len(busy.grants)}")
            assert sorted(number for number, *_ in busy.grants) == list(range(1, 31))
            assert len({lease.lease for _, lease, *_ in busy.grants}) == 30
            await eventually(lambda: idle.lent() + other.lent() == 30, "nothing set aside in vain")
            while busy.grants:
                busy.end()
            await eventually(lambda: idle.lent() + other.lent() == 0, "all places back")

    run(test)


def test_an_elder_of_another_host_goes_first(hosts: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thief, "WATCH_S", 0.1)

    async def test() -> None:
        busy, idle, _ = hosts
        slot = idle.admit(FAR.format(1), 1)
        idle.run.writer.queue[slot] = 1  # held: its own wait for it
        async with members(busy, idle):
            idle.wait(1, waited_s=0.1)
            assert not idle.member.yields(slot)
            busy.wait(1, 2, waited_s=5.0)
            await eventually(lambda: idle.member.yields(slot), "the place is set aside")
            await eventually(lambda: len(busy.grants) == 1, "and offered")
            assert [number for number, *_ in busy.grants] == [1]
            assert len(idle.waits) == 1
            busy.waits.clear()  # the other one is gone: what is set aside for it comes back
            busy.member.poke()
            if idle.member.yields(slot):
                sweeps = idle.sweeps
                await eventually(lambda: idle.lent() == 1 and idle.sweeps > sweeps, "ours again")

    run(test)


def test_nothing_is_set_aside_for_an_elder_whom_the_place_cannot_serve(
    hosts: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thief, "WATCH_S", 0.05)

    async def test() -> None:
        busy, _, other = hosts
        far = other.admit(FAR.format(1), 1, "n")
        near = other.admit("http://127.0.0.1:8000", 1)
        for slot in (far, near):
            other.run.writer.queue[slot] = 1  # held: its own wait for it
        async with members(busy, other):
            other.wait(1)
            busy.wait(1, waited_s=5.0, model="m")
            asked = other.events[SchedulerEvent.CLUSTER_ROUND_TRIPS] + 4
            await eventually(lambda: other.events[SchedulerEvent.CLUSTER_ROUND_TRIPS] > asked, "it has looked")
            assert not other.member.yields(far)
            assert not other.member.yields(near)
            busy.wait(2, waited_s=5.0, model="n")
            await eventually(lambda: other.member.yields(far), "set aside for the second one")
            assert not other.member.yields(near)

    run(test)


def test_a_host_whose_term_is_forgotten_joins_anew_and_says_everything_again(
    hosts: list[Host], redis: RedisServer
) -> None:
    async def test() -> None:
        busy, idle, _ = hosts
        async with members(busy, idle):
            busy.wait(1, 2)
            idle.admit(FAR.format(1), 1)
            await eventually(lambda: busy.grants, "one granted")
            redis.command("FLUSHALL")
            await eventually(lambda: idle.events[SchedulerEvent.CLUSTER_LOST] == 1, "noticed")
            await eventually(lambda: busy.events[SchedulerEvent.CLUSTER_LOST] == 1, "noticed")
            await eventually(lambda: busy.state == idle.state == (ClusterState.JOINED, 2), "joined")
            assert idle.lent() == 1  # the request runs, and both know it
            busy.end()
            await eventually(lambda: len(busy.grants) == 1, "the second one, published again")

    run(test)


def test_without_redis_a_host_is_alone_and_says_why(hosts: list[Host], tmp_path: Path) -> None:
    async def test() -> None:
        own = RedisServer(tmp_path)
        own.start()
        one, two = Host(tmp_path / "1", own, "one"), Host(tmp_path / "2", own, "two")
        async with members(one, two):
            one.wait(1)
            own.kill()
            await eventually(lambda: one.state == two.state == (ClusterState.AWAY, 0), "alone")
            assert f"127.0.0.1:{own.port}" in str(one.member.status()["reason"])
            assert list(one.waits) == [(0, 1, 1)]
            own.start()
            two.admit(FAR.format(1), 1)
            await eventually(lambda: one.grants, "together again")
        for host in (one, two):
            host.run.__exit__()
        own.stop()

    run(test)


def test_a_borrower_that_vanishes_keeps_no_place(hosts: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.cluster.store.LEASE_MS", 300)
    monkeypatch.setattr("broker.cluster.lending.GRACE_NS", 100_000_000)

    async def test() -> None:
        busy, idle, _ = hosts
        idle.admit(FAR.format(1), 1)
        async with members(idle):
            task = asyncio.create_task(busy.member.run())
            busy.wait(1)
            await eventually(lambda: busy.grants, "granted")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await eventually(lambda: idle.lent() == 0, "the lease is over")
            assert idle.events[SchedulerEvent.CLUSTER_EXPIRED] == 1

    run(test)


def test_foreign_records_are_counted_and_passed_over(hosts: list[Host], redis: RedisServer) -> None:
    async def test() -> None:
        busy, idle, _ = hosts
        idle.admit(FAR.format(1), 1)
        for kind in ("term", "record", "load"):
            redis.command("HSET", "penstock:default:host:fd", kind, "{}")
        redis.command("ZADD", "penstock:default:members", 1 << 52, "fd")
        redis.command("ZADD", "penstock:default:load:0", 99, "fd")
        async with members(busy, idle):
            await eventually(lambda: idle.events[SchedulerEvent.CLUSTER_IGNORED] > 0, "counted")
            busy.wait(1)
            await eventually(lambda: busy.grants, "and no harm")

    run(test)


def test_nothing_is_published_while_nobody_else_is_there(hosts: list[Host]) -> None:
    async def test() -> None:
        busy, idle, _ = hosts
        async with members(busy):
            busy.wait(*range(1, 20))
            before = busy.events[SchedulerEvent.CLUSTER_ROUND_TRIPS]
            for _ in range(20):
                busy.member.poke()
                await asyncio.sleep(0)
            assert busy.events[SchedulerEvent.CLUSTER_ROUND_TRIPS] - before <= 2
            idle.admit(FAR.format(1), 1)
            task = asyncio.create_task(idle.member.run())
            await eventually(lambda: busy.grants, "published for whoever comes")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    run(test)


def test_the_cells_say_how_it_stands(hosts: list[Host]) -> None:
    assert hosts[0].run.writer.cells[Cell.CLUSTER] == ClusterState.AWAY
