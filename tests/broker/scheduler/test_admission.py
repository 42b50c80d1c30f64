"""The queue's place in the scheduler, over a real table: what it grants, reserves, holds and forgets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker import wire
from broker.config import Scheduler
from broker.counters import FrontendCounters
from broker.lease import Lease, take
from broker.scheduler.admission import HEED_NS, PATIENCE_NS, Admission
from broker.table import QueueColumn, SchedulerEvent, State
from broker.types import Role
from tests.support.table import Run

A, B = "http://a:1", "http://b:1"
NEVER = 1 << 62


class Queue:
    """Two instances that take one request each, and two frontends."""

    def __init__(self, path: Path, **keys: Any) -> None:
        self.run = Run(path)
        self.slots = {url: self.run.admit(url, "m") for url in (A, B)}
        self.frontends: list[FrontendCounters] = [self.run.frontend(row) for row in range(2)]
        self.settings = Scheduler(instance_capacity=1, **keys)
        self.now = 0
        self.heard: list[tuple[bytes, wire.Grants]] = []
        self.start()
        for row in range(2):
            self.say(row)

    def start(self) -> None:
        """A scheduler takes over."""
        reader, writer = self.run.attach_reader(), self.run.writer
        self.admission = Admission(reader, writer.queue, writer.events, self.settings, self.outlet, self.now)

    def outlet(self, address: bytes, message: wire.Grants) -> None:
        self.heard.append((address, wire.decode(wire.to_frontend, wire.encode(message))))  # type: ignore[arg-type]  # it is one

    def say(self, row: int, life: int = 1, **fields: Any) -> None:
        self.admission.hear(b"peer-%d" % row, wire.Tickets(row, life, **fields), self.now)

    def offer(self, row: int, *numbers: int, home: str = A, model: str = "m", at: int | None = None) -> None:
        tickets = [
            wire.Ticket(number, Role.MIXED, model, 5, self.slots[home], 1, "", self.now if at is None else at, NEVER)
            for number in numbers
        ]
        self.say(row, offered=tickets)

    def sweep(self) -> list[tuple[bytes, wire.Grants]]:
        """What the frontends are told."""
        self.admission.sweep(self.now)
        heard, self.heard = self.heard, []
        return heard

    def granted(self) -> list[tuple[int, int, str]]:
        """(row, number, instance) in their order."""
        urls = {slot: url for url, slot in self.slots.items()}
        return [
            (int(address[-1:]), grant.number, urls[grant.slot])
            for address, message in self.sweep()
            for grant in message.granted
        ]

    def take(self, row: int, url: str) -> Lease:
        lease = take(self.run.reader, self.frontends[row], self.slots[url], 1)
        assert lease is not None
        return lease

    def fill(self) -> dict[str, Lease]:
        return {url: self.take(0, url) for url in self.slots}

    def cell(self, column: QueueColumn, url: str) -> int:
        value: int = self.run.writer.queue[column * self.run.writer.slots + self.slots[url]]
        return value

    def event(self, event: SchedulerEvent) -> int:
        return self.run.reader.events()[event]


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    it = Queue(tmp_path)
    yield it
    it.run.__exit__()


def test_a_ticket_waits_until_there_is_room_and_nobody_overtakes_it_meanwhile(queue: Queue) -> None:
    leases = queue.fill()
    queue.offer(0, 1)
    assert queue.granted() == []
    assert [queue.cell(QueueColumn.HELD, url) for url in (A, B)] == [1, 1]
    leases[A].close()
    assert queue.granted() == [(0, 1, A)]
    assert [queue.cell(QueueColumn.HELD, url) for url in (A, B)] == [0, 0]


def test_a_grant_reserves_its_place_until_the_lease_shows(queue: Queue) -> None:
    queue.fill()[A].close()
    queue.offer(0, 1, 2)
    assert queue.granted() == [(0, 1, A)]
    assert queue.cell(QueueColumn.RESERVED, A) == 1
    assert queue.granted() == []
    lease = queue.take(0, A)
    assert queue.granted() == []
    queue.say(0, taken=[1])
    assert queue.cell(QueueColumn.RESERVED, A) == 0
    assert queue.granted() == []
    lease.close()
    assert queue.granted() == [(0, 2, A)]


def test_a_place_that_is_set_aside_for_another_host_is_not_granted(queue: Queue) -> None:
    queue.admission.yields = lambda slot: slot == queue.slots[A]
    queue.offer(0, 1, 2)
    assert queue.granted() == [(0, 1, B)]
    queue.admission.yields = lambda _: False
    assert queue.granted() == [(0, 2, A)]


def test_an_instance_without_a_limit_sets_one_place_aside_at_a_time(queue: Queue) -> None:
    queue.settings = Scheduler()
    queue.start()
    queue.now += PATIENCE_NS
    asked: list[int] = []
    queue.admission.yields = lambda slot: not asked.append(slot)
    queue.offer(0, 1)
    assert [number for _, number, _ in queue.granted()] == [1]
    assert sorted(asked) == sorted(queue.slots.values())


def test_a_returned_ticket_stands_where_it_stood(queue: Queue) -> None:
    queue.fill()[A].close()
    queue.offer(0, 1)
    queue.now += 1
    queue.offer(1, 2)
    assert queue.granted() == [(0, 1, A)]
    queue.say(0, returned=[1])
    assert queue.granted() == [(0, 1, A)]
    assert queue.event(SchedulerEvent.TICKETS_RETURNED) == 1
    assert (queue.cell(QueueColumn.GRANTED, A), queue.cell(QueueColumn.RETURNED, A)) == (2, 1)


def test_how_long_was_waited_for_an_instance_is_counted(queue: Queue) -> None:
    leases = queue.fill()
    queue.offer(0, 1, 2)
    for seconds in (0.25, 0.5):
        queue.now += int(seconds * 1e9)
        leases[A].close()
        ((_, number, _),) = queue.granted()
        leases[A] = queue.take(0, A)
        queue.say(0, taken=[number])
    assert queue.cell(QueueColumn.GRANTED, A) == 2
    assert queue.cell(QueueColumn.WAITED_US, A) == 250_000 + 750_000


def test_an_idle_instance_takes_from_a_busy_one_and_it_is_told_from_where(queue: Queue) -> None:
    leases = queue.fill()
    queue.offer(0, 1, 2)
    leases[B].close()
    ((_, message),) = queue.sweep()
    assert message.granted == [wire.Grant(1, queue.slots[B], 1, queue.slots[A])]
    assert queue.cell(QueueColumn.STOLEN, B) == queue.cell(QueueColumn.ROBBED, A) == 1
    assert queue.event(SchedulerEvent.TICKETS_STOLEN) == 1


def test_what_a_ticket_says_of_its_prompt_decides_what_is_stolen(queue: Queue) -> None:
    """The prompt of the first is cached where it waits, the second's nowhere, the third's at the thief as well."""
    leases = queue.fill()
    a, b = queue.slots[A], queue.slots[B]
    for number, cached in enumerate(({a: 4000}, {}, {a: 4000, b: 4000}, {a: 2000, -7: 5, 10**9: -3}), 1):
        queue.now += 1
        ticket = wire.Ticket(number, Role.MIXED, "m", 5000, a, 1, "", queue.now, NEVER, cached)
        queue.say(0, offered=[ticket])
    queue.sweep()
    queue.admission.tick(queue.now)
    assert queue.cell(QueueColumn.TOKENS, A) == 1000 + 5000 + 1000 + 3000
    order = []
    while len(order) < 4:
        leases[B].close()
        (granted,) = queue.granted()
        order.append(granted[1])
        leases[B] = queue.take(0, B)
        queue.say(0, taken=[granted[1]])
    assert order == [2, 3, 4, 1]


def test_nobody_steals_what_its_own_instance_has_room_for(queue: Queue) -> None:
    queue.offer(0, 1, home=B)
    queue.offer(0, 2, home=A)
    assert sorted(queue.granted()) == [(0, 1, B), (0, 2, A)]


def test_a_withdrawn_ticket_gives_back_what_was_reserved_for_it(queue: Queue) -> None:
    queue.fill()[A].close()
    queue.offer(0, 1, 2)
    queue.sweep()
    queue.say(0, withdrawn=[1])
    assert queue.granted() == [(0, 2, A)]
    assert queue.event(SchedulerEvent.TICKETS_WITHDRAWN) == 1


def test_everything_may_be_said_twice(queue: Queue) -> None:
    queue.fill()[A].close()
    queue.offer(0, 1, 2)
    queue.offer(0, 1, 2)
    queue.sweep()
    queue.offer(0, 1, 2)
    for _ in range(2):
        queue.say(0, taken=[1], withdrawn=[2], returned=[1])
    assert queue.granted() == []
    assert queue.cell(QueueColumn.RESERVED, A) == 0
    assert queue.event(SchedulerEvent.TICKETS_OFFERED) == 2


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    queue = Queue(tmp_path, queue_max_tickets=1)
    queue.fill()
    queue.offer(0, 1, 2)
    ((_, message),) = queue.sweep()
    assert [refusal.number for refusal in message.refused] == [2]
    assert message.refused[0].retry_after_s >= 1
    assert queue.event(SchedulerEvent.TICKETS_REFUSED) == 1


def test_tickets_follow_their_instances(queue: Queue) -> None:
    """A goes: its tickets wait at B. B goes, too: their frontends are told to choose again."""
    queue.fill()
    queue.offer(0, 1)
    queue.sweep()
    queue.run.writer.set_state(queue.slots[A], State.DRAINING)
    assert queue.sweep() == []
    assert [queue.cell(QueueColumn.HELD, url) for url in (A, B)] == [0, 1]
    queue.run.writer.set_state(queue.slots[B], State.DOWN)
    ((address, message),) = queue.sweep()
    assert (address, message.lost) == (b"peer-0", [1])


def test_a_name_that_nobody_serves_is_not_a_line_of_its_own(queue: Queue) -> None:
    queue.fill()
    queue.offer(0, 1, model="unheard-of")
    ((_, message),) = queue.sweep()
    assert message.lost == [1]


def test_an_expired_ticket_is_forgotten(queue: Queue) -> None:
    queue.fill()
    queue.say(0, offered=[wire.Ticket(1, Role.MIXED, "m", 5, queue.slots[A], 1, "", 0, 100)])
    queue.sweep()
    queue.admission.tick(99)
    assert queue.cell(QueueColumn.TICKETS, A) == 1
    queue.admission.tick(100)
    assert queue.cell(QueueColumn.TICKETS, A) == queue.cell(QueueColumn.TOKENS, A) == 0


def test_a_frontend_that_is_swapped_out_keeps_its_places_in_line(queue: Queue) -> None:
    leases = queue.fill()
    queue.offer(0, 1)
    queue.sweep()
    queue.run.roster.leaves(0)  # it takes no more connections; its requests go on
    queue.admission.tick(queue.now)
    leases[A].close()
    assert queue.granted() == [(0, 1, A)]


def test_a_dead_frontends_tickets_and_reservations_vanish(queue: Queue) -> None:
    queue.fill()[A].close()
    queue.offer(0, 1, 2)
    queue.offer(1, 3)
    assert queue.granted() == [(0, 1, A)]
    queue.run.roster.settle(0)
    queue.admission.tick(queue.now)
    assert queue.granted() == [(1, 3, A)]
    assert queue.event(SchedulerEvent.TICKETS_WITHDRAWN) == 2


def test_a_frontend_that_heeds_no_grant_loses_its_place_until_it_speaks(queue: Queue) -> None:
    queue.fill()[A].close()
    queue.offer(0, 1, 2)
    queue.offer(1, 3)
    assert queue.granted() == [(0, 1, A)]
    queue.now += HEED_NS + 1
    queue.admission.tick(queue.now)
    assert queue.heard == [(b"peer-0", wire.Grants(again=True))]
    queue.heard.clear()
    assert queue.granted() == [(1, 3, A)]


def test_a_new_scheduler_grants_nothing_until_everybody_has_offered_again(queue: Queue) -> None:
    leases = queue.fill()
    queue.offer(1, 1)
    queue.now += 1
    queue.offer(0, 1)
    queue.sweep()
    queue.start()
    leases[A].close()
    assert queue.cell(QueueColumn.HELD, A) == 1
    queue.offer(0, 1, at=1)
    assert queue.granted() == []
    queue.offer(1, 1, at=0)
    assert queue.granted() == [(1, 1, A)]


def test_it_does_not_wait_for_ever_for_a_frontend_that_stands_still(queue: Queue) -> None:
    queue.fill()[A].close()
    queue.start()
    queue.offer(0, 1)
    assert queue.granted() == []
    queue.now += PATIENCE_NS
    assert queue.granted() == [(0, 1, A)]


def test_what_a_dead_scheduler_had_reserved_and_held_is_given_back(queue: Queue) -> None:
    queue.fill()[A].close()
    queue.offer(0, 1, 2)
    queue.sweep()
    assert queue.cell(QueueColumn.RESERVED, A) == queue.cell(QueueColumn.HELD, A) == 1
    queue.start()
    for row in range(2):
        queue.say(row)
    queue.sweep()
    assert queue.cell(QueueColumn.RESERVED, A) == queue.cell(QueueColumn.HELD, A) == 0
    assert queue.admission.is_idle


def test_many_grants_fit_their_messages(tmp_path: Path) -> None:
    queue = Queue(tmp_path, queue_max_tickets=5000)
    queue.settings = Scheduler(instance_capacity=4000, queue_max_tickets=5000)
    queue.start()
    for row in range(2):
        queue.say(row)
    for start in range(0, 1000, 100):
        queue.offer(0, *range(start, start + 100))
    messages = [message for _, message in queue.sweep()]
    assert sum(len(message.granted) for message in messages) == 1000
    assert all(len(wire.encode(message)) <= wire.MAX_CONTROL_BYTES for message in messages)


def test_numbers_out_of_range_do_no_harm(queue: Queue) -> None:
    queue.fill()
    wild = [
        wire.Ticket(1, Role.MIXED, "m", -5, 10**9, 99, "", NEVER, NEVER),
        wire.Ticket(2, Role.MIXED, None, 3, -1, -7, "", -NEVER, NEVER),
    ]
    queue.say(0, offered=wild)
    queue.sweep()
    queue.admission.tick(queue.now)
    assert sum(queue.cell(QueueColumn.TICKETS, url) for url in (A, B)) == 2
