"""The thief's half: what it offers, and that every place comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from broker.cluster.lending import GRACE_NS, MOST_ROOM, REST_NS, Lending, Lent
from broker.cluster.records import ForeignRecord, Place
from broker.lease import take
from broker.table import QueueColumn, State
from broker.types import EngineKind, LoadReport, Role
from tests.support.table import Run, instance

FAR, NEAR = "http://10.0.0.1:8000", "http://127.0.0.1:8000"
S = 1_000_000_000


class Host:
    def __init__(self, path: Path) -> None:
        self.run = Run(path)
        self.counters = self.run.frontend(0)
        self.lending = self.successor()

    def successor(self) -> Lending:
        return Lending(self.run.reader, self.run.writer.queue, 0, "this machine", self.run.clock)

    def admit(self, url: str, capacity: int, **fields: object) -> int:
        made = msgspec.structs.replace(instance(url), capacity=capacity, **fields)
        return self.run.writer.admit(made, self.run.clock())

    def lent(self, slot: int) -> int:
        count: int = self.run.writer.queue[QueueColumn.LENT * self.run.writer.slots + slot]
        return count

    def rooms(self) -> dict[int, int]:
        return {place.slot: place.room for place in self.lending.places()}

    def begin(self, slot: int, term: str, until_ns: int) -> Lent:
        self.lending.places()  # looks at the table, as whoever offers has done
        return self.lending.begin(slot, term, until_ns)

    def use(self, slot: int) -> None:
        self.run.reader.entries()
        assert take(self.run.reader, self.counters, slot, 1, 1) is not None


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    it = Host(tmp_path)
    yield it
    it.run.__exit__()


def test_a_place_is_what_has_room_and_who_can_reach_it(host: Host) -> None:
    far = host.admit(FAR, 3, models=("m", "n"))
    near = host.admit(NEAR, 2)
    host.use(far)
    assert sorted(host.lending.places()) == [
        Place(far, Role.MIXED, ("m", "n"), 2, None),
        Place(near, Role.MIXED, (), 2, "this machine"),
    ]


def test_what_is_full_held_draining_or_of_a_pair_is_not_offered(host: Host) -> None:
    full, held, draining = (host.admit(f"{FAR}{k}", 1) for k in range(3))
    host.admit(f"{FAR}3", 1, role=Role.PREFILL)
    host.use(full)
    host.run.writer.queue[held] = 1  # QueueColumn.HELD: our own wait for it
    host.run.writer.set_state(draining, State.DRAINING)
    assert host.lending.places() == []


def test_an_instance_of_unknown_capacity_is_offered_once_and_only_when_idle(host: Host) -> None:
    slot = host.admit(FAR, 0)
    assert host.rooms() == {slot: 1}
    host.begin(slot, "t", S)
    assert host.rooms() == {}


def test_room_is_bounded(host: Host) -> None:
    slot = host.admit(FAR, 100_000)
    assert host.rooms() == {slot: MOST_ROOM}


@pytest.mark.parametrize("engine", [EngineKind.NATIVE, EngineKind.VLLM])
def test_what_is_lent_takes_room_until_it_ends(host: Host, engine: EngineKind) -> None:
    slot = host.admit(FAR, 2, engine=engine, incarnation=b"i" * 16)
    one = host.begin(slot, "t", S)
    two = host.begin(slot, "t", S)
    assert one.lease != two.lease
    assert (host.lent(slot), host.rooms()) == (2, {})
    assert host.lending.end(one.lease)
    assert not host.lending.end(one.lease)
    assert (host.lent(slot), host.rooms()) == (1, {slot: 1})


def test_a_report_that_counts_lent_requests_does_not_count_them_twice(host: Host) -> None:
    slot = host.admit(FAR, 4, engine=EngineKind.VLLM)
    lent = host.begin(slot, "t", host.run.clock() + S)
    host.run.writer.report(slot, LoadReport(running=2, waiting=0), host.run.clock())  # one is somebody else's
    assert host.rooms() == {slot: 2}
    host.lending.end(lent.lease)
    assert host.rooms() == {slot: 3}  # at once, not at the next report


def test_a_lease_ends_by_our_own_clock_unless_it_is_renewed(host: Host) -> None:
    slot = host.admit(FAR, 2)
    now = host.run.clock()
    kept = host.begin(slot, "t", now + S)
    host.begin(slot, "t", now + S)
    host.lending.renewed(kept.lease, now + 9 * S)
    host.lending.renewed(kept.lease, now)  # never shortens it
    assert host.lending.expire(now + S + GRACE_NS - 1) == 0
    assert host.lending.expire(now + S + GRACE_NS) == 1
    assert [lent.lease for lent in host.lending.leases] == [kept.lease]
    assert host.lending.expire(now + 9 * S + GRACE_NS) == 1
    assert host.lent(slot) == 0


def test_an_instance_that_failed_elsewhere_rests(host: Host) -> None:
    slot = host.admit(FAR, 2)
    lent = host.begin(slot, "t", S)
    host.lending.end(lent.lease, failed=True)
    assert host.rooms() == {}
    host.run.clock.advance(REST_NS / S)
    assert host.rooms() == {slot: 2}


def test_places_of_an_instance_that_left_burden_nobody(host: Host) -> None:
    slot = host.admit(FAR, 2)
    lent = host.begin(slot, "t", S)
    host.run.writer.remove(slot, host.run.clock())
    host.run.writer.reclaim(host.run.clock.advance(31))
    assert host.admit(f"{FAR}9", 1) == slot
    assert (host.lent(slot), host.rooms()) == (0, {slot: 1})
    assert host.lending.end(lent.lease)
    assert host.lent(slot) == 0


def test_the_next_scheduler_goes_on_with_what_redis_kept(host: Host) -> None:
    slot = host.admit(FAR, 3)
    one, two = host.begin(slot, "t", S), host.begin(slot, "t", S)
    after = host.successor()
    assert host.lent(slot) == 2  # until it knows better
    after.restore(one.lease, one.note, host.run.clock() + S)
    after.show_all()
    assert host.lent(slot) == 1
    host.run.writer.remove(slot, host.run.clock())
    with pytest.raises(ForeignRecord):
        after.restore(two.lease, two.note, S)
    with pytest.raises(ForeignRecord):
        after.restore(two.lease, b"something else", S)


def test_places_that_are_set_aside_are_offered_alone_and_say_what_they_cost(host: Host) -> None:
    one, two = host.admit(FAR, 1), host.admit(f"{FAR}1", 5)
    host.run.writer.queue[one] = 1  # held: our own wait
    host.begin(one, "t", S)
    assert host.lending.places({one: 1}, 700) == [Place(one, Role.MIXED, (), 1, None, 700)]
    assert host.rooms() == {two: 5}
