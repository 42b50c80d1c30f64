"""A frontend's side of the queue: when a request waits, what the scheduler is told, and what becomes of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from broker import wire
from broker.config import Scheduler
from broker.counters import CounterColumn, TotalColumn
from broker.errors import ModelNotFound, NoInstance, PenstockError, QueueFull, QueueTimeout
from broker.route import RouteRequest
from broker.table import QueueColumn, State
from broker.types import Instance
from frontend.admission import PER_MESSAGE, TICK_S, Admission
from frontend.dispatch import Choice, Chosen
from frontend.remote import RemoteChoice
from frontend.standing import Waiting
from frontend.upstream.base import Headers
from frontend.waiting import Saturated
from tests.frontend.fakes import Frontend

A, B = "http://10.0.0.1:80", "http://10.0.0.2:80"
REQUEST = RouteRequest(model="tiny", prompt_tokens=7)
NOW = 1000.0


class Turns:
    """`call_soon` until the turn comes; timers as in the fakes' time."""

    def __init__(self, frontend: Frontend) -> None:
        self._time = frontend.time
        self._soon: list[Any] = []

    def time(self) -> float:
        return self._time.time()

    def call_soon(self, call: Any, *arguments: object) -> None:
        self._soon.append((call, arguments))

    def call_later(self, delay: float, call: Any, *arguments: object) -> Any:
        return self._time.call_later(delay, lambda: call(*arguments))

    def turn(self) -> None:
        while self._soon:
            calls, self._soon = self._soon, []
            for call, arguments in calls:
                call(*arguments)


class Waiter:
    """Whoever waits, and what it heard."""

    def __init__(self) -> None:
        self.choice: Chosen | None = None
        self.home = ""
        self.error: PenstockError | None = None

    def granted(self, choice: Chosen, waited_s: float, home: str) -> None:
        assert self.choice is self.error is None
        assert waited_s >= 0
        self.choice, self.home = choice, home

    def refused(self, error: PenstockError) -> None:
        assert self.choice is self.error is None
        self.error = error


class Line:
    """An `Admission` over two instances that take two requests each; the test plays the scheduler."""

    def __init__(self, path: Path, **keys: Any) -> None:
        self.frontend = Frontend(
            path, A, B, scheduler=Scheduler(**{"policy": "request_num", "instance_capacity": 2, **keys})
        )
        self.turns = Turns(self.frontend)
        self.sent: list[wire.Tickets] = []
        self.connected = True
        frontend, loop = self.frontend, cast("asyncio.AbstractEventLoop", self.turns)
        self.table = frontend.run
        self.admission = Admission(
            frontend.config, frontend.run.reader, frontend.dispatcher, frontend.counters, 1, loop, self.send
        )
        self.alive = True

    def send(self, message: wire.Tickets) -> bool:
        if self.connected:
            self.sent.append(wire.decode(wire.from_frontend, wire.encode(message)))  # type: ignore[arg-type]  # it is one
        return self.connected

    @property
    def alive(self) -> bool:
        return self.frontend.run.reader.alive(0)

    @alive.setter
    def alive(self, alive: bool) -> None:
        """For ever, as real time passes."""
        self.table.writer.beat(1 << 62 if alive else -(1 << 62))

    def choose(self) -> Choice:
        return self.admission.choose(REQUEST, (), NOW)

    def fill(self) -> list[Choice]:
        return [self.choose() for _ in range(4)]

    def wait(self, headers: Headers | None = None, route: RouteRequest = REQUEST) -> tuple[Waiting, Waiter]:
        with pytest.raises(Saturated) as saturated:
            self.admission.choose(route, (), NOW)
        waiter = Waiter()
        return self.admission.wait(route, headers or [], saturated.value.home, waiter), waiter

    def turn(self) -> wire.Tickets:
        """The one message of a turn."""
        self.turns.turn()
        (message,) = self.sent
        self.sent.clear()
        return message

    def grant(self, number: int, url: str, home: str = A) -> None:
        slot = self.frontend.slots[url]
        generation = int(self.table.reader.snapshot[1, slot])
        self.admission.hear(wire.Grants([wire.Grant(number, slot, generation, self.frontend.slots[home])]))

    def cell(self, column: QueueColumn, url: str, value: int) -> None:
        self.table.writer.queue[column * self.table.writer.slots + self.frontend.slots[url]] = value


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    it = Line(tmp_path)
    yield it
    it.frontend.close()


# -- whether to wait ---------------------------------------------------------------------------------------


def test_with_room_nothing_is_said_to_anybody(line: Line) -> None:
    choices = line.fill()
    assert line.frontend.in_flight == [2, 2]
    for choice in choices:
        choice.lease.close()
    line.turns.turn()
    assert line.sent == []
    assert line.frontend.total(TotalColumn.QUEUED) == 0


def test_a_full_choice_gives_way_to_one_with_room(tmp_path: Path) -> None:
    line = Line(tmp_path, policy="round_robin")
    held = [line.frontend.dispatcher.claim(REQUEST, line.frontend.slots[A], 1, NOW) for _ in range(2)]
    assert all(held)
    assert [line.choose().instance.url for _ in range(2)] == [B, B]
    assert line.frontend.in_flight == [2, 2]
    assert line.frontend.counted(CounterColumn.STARTED) - line.frontend.counted(CounterColumn.WITHDRAWN) == 4
    line.frontend.close()


def test_when_all_are_full_it_is_saturated_and_holds_nothing(line: Line) -> None:
    line.fill()
    with pytest.raises(Saturated):
        line.choose()
    assert line.frontend.in_flight == [2, 2]


def test_a_place_that_is_reserved_for_one_in_line_is_taken(line: Line) -> None:
    *_, last = line.fill()
    last.lease.close()
    line.cell(QueueColumn.RESERVED, last.instance.url, 1)
    with pytest.raises(Saturated):
        line.choose()
    line.cell(QueueColumn.RESERVED, last.instance.url, 0)
    assert line.choose().instance.url == last.instance.url


def test_nobody_overtakes_those_in_line(line: Line) -> None:
    for url in (A, B):
        line.cell(QueueColumn.HELD, url, 1)
    with pytest.raises(Saturated):
        line.choose()
    line.cell(QueueColumn.HELD, B, 0)
    assert line.choose().instance.url == B


def test_a_request_that_failed_elsewhere_does_not_wait_again(line: Line) -> None:
    line.fill()
    slot = line.frontend.slots[A]
    assert line.admission.choose(REQUEST, [slot], NOW).instance.url == B


def test_an_instance_whose_breaker_is_open_is_no_way_around_the_line(line: Line) -> None:
    slot = line.frontend.slots[B]
    for _ in range(3):
        line.frontend.breaker.failed(slot, 1, NOW)
    assert [line.choose().instance.url for _ in range(2)] == [A, A]
    with pytest.raises(Saturated):
        line.choose()


def test_without_an_instance_there_is_nothing_to_wait_for(line: Line) -> None:
    with pytest.raises(ModelNotFound):
        line.admission.choose(RouteRequest(model="other"), (), NOW)


# -- what the scheduler is told ----------------------------------------------------------------------------


def test_what_a_turn_has_to_say_is_one_message(line: Line) -> None:
    held = line.fill()
    for _ in range(3):
        line.wait()
    for url in (A, B):
        line.cell(QueueColumn.HELD, url, 1)
    held[0].lease.close()
    message = line.turn()
    assert [ticket.number for ticket in message.offered] == [1, 2, 3]
    assert message.freed
    assert message.complete
    ticket = message.offered[0]
    assert (ticket.model, ticket.prompt, ticket.priority) == ("tiny", 7, 1)
    assert ticket.home in line.frontend.slots.values()
    assert ticket.deadline_ns - ticket.offered_ns == 900 * 10**9


def test_many_tickets_fit_their_messages_with_the_longest_names(line: Line) -> None:
    line.fill()
    route = RouteRequest(model="m" * 100_000, prompt_tokens=1)
    with pytest.raises(ModelNotFound):
        line.admission.choose(route, (), NOW)
    for _ in range(PER_MESSAGE + 1):
        line.admission.wait(route, [(b"authorization", b"x" * 10_000)], 0, Waiter())
    line.turns.turn()
    assert [len(message.offered) for message in line.sent] == [PER_MESSAGE, 1]
    assert [message.complete for message in line.sent] == [False, True]
    assert all(len(wire.encode(message)) <= wire.MAX_CONTROL_BYTES for message in line.sent)


def test_clients_are_told_apart_by_a_digest_and_priorities_by_name(line: Line) -> None:
    line.fill()
    line.wait([(b"authorization", b"Bearer secret"), (b"x-penstock-priority", b"High")])
    line.wait([(b"authorization", b"Bearer other"), (b"x-penstock-priority", b"urgent!")])
    line.wait([(b"x-penstock-priority", b"low")])
    tickets = line.turn().offered
    assert [ticket.priority for ticket in tickets] == [0, 1, 2]
    assert len({ticket.key for ticket in tickets}) == 3
    assert tickets[2].key == ""
    assert not any("secret" in ticket.key for ticket in tickets)


def test_what_could_not_be_sent_is_said_again(line: Line) -> None:
    line.fill()
    line.connected = False
    line.wait()
    line.turns.turn()
    line.connected = True
    line.frontend.time.advance(TICK_S)
    assert len(line.turn().offered) == 1


def test_a_new_scheduler_is_told_of_everything_that_waits_and_of_nothing_waiting(line: Line) -> None:
    line.admission.offer_again()
    assert line.turn() == wire.Tickets(0, 1)
    line.fill()
    line.wait()
    line.wait()
    first = line.turn()
    line.admission.hear(wire.Grants(again=True))
    assert line.turn().offered == first.offered


# -- how it ends -------------------------------------------------------------------------------------------


def test_a_grant_is_a_lease_and_the_scheduler_hears_that_it_is_taken(line: Line) -> None:
    line.fill()[0].lease.close()
    line.cell(QueueColumn.HELD, A, 1)
    line.cell(QueueColumn.HELD, B, 1)
    waiting, waiter = line.wait()
    line.turn()
    line.grant(1, B, home=A)
    assert waiter.choice is not None
    assert waiter.choice.instance.url == B
    assert waiter.home == A
    assert sum(line.frontend.in_flight) == 4
    assert line.turn().taken == [1]
    waiting.leave()
    line.turns.turn()
    assert line.sent == []


def test_an_instance_that_has_changed_is_returned_and_the_request_waits_on(line: Line) -> None:
    line.fill()
    _, waiter = line.wait()
    line.turn()
    line.table.writer.set_state(line.frontend.slots[B], State.DOWN)
    line.grant(1, B)
    assert line.turn().returned == [1]
    assert waiter.choice is None
    line.grant(1, A)
    assert waiter.choice is not None


def granted_there(number: int, url: str = "http://10.9.9.9:80") -> wire.Grants:
    instance = msgspec.msgpack.encode(Instance(url=url))
    return wire.Grants(remote=[wire.RemoteGrant(number, wire.RemoteLease(f"l{number}", "host"), "name", instance, 0)])


def test_an_instance_of_another_host_is_taken_held_and_given_back(line: Line) -> None:
    line.fill()
    _, waiter = line.wait()
    line.turn()
    line.admission.hear(granted_there(1))
    assert isinstance(waiter.choice, RemoteChoice)
    assert waiter.choice.where == "http://10.9.9.9:80@name"
    assert sum(line.frontend.in_flight) == 4  # none of ours is any fuller
    assert line.turn().taken == [1]
    line.admission.placed(REQUEST, waiter.choice)  # no policy of ours notes what is cached there
    line.admission.offer_again()  # a new scheduler
    again = line.turn()
    assert (again.offered, again.held, again.ended) == ([], [wire.RemoteLease("l1", "host")], [])
    waiter.choice.lease.close()
    assert line.turn().ended == [wire.RemoteLease("l1", "host")]
    line.admission.offer_again()
    assert line.turn().held == []


def test_what_ended_while_no_scheduler_listened_is_said_later(line: Line) -> None:
    line.fill()
    _, waiter = line.wait()
    line.turn()
    line.admission.hear(granted_there(1))
    line.connected = False
    assert waiter.choice is not None
    waiter.choice.lease.close()
    line.turns.turn()
    line.connected = True
    line.frontend.time.advance(TICK_S)
    message = line.turn()
    assert (message.taken, [lease.lease for lease in message.ended]) == ([1], ["l1"])


def test_a_request_that_failed_at_another_host_stands_where_it_stood_and_stays_here(line: Line) -> None:
    line.fill()
    waiting, waiter = line.wait()
    line.turn()
    line.admission.hear(granted_there(1))
    assert waiter.choice is not None
    tried = [waiter.choice.lease.slot]
    with pytest.raises(Saturated) as saturated:
        line.admission.choose(REQUEST, tried, NOW)
    again = line.admission.wait(REQUEST, [], saturated.value.home, Waiter(), waiting.since_ns)
    (ticket,) = line.turn().offered
    assert (ticket.number, ticket.offered_ns, ticket.abroad) == (again.number, waiting.since_ns, False)
    assert ticket.deadline_ns == waiting.ticket(line_timeout_ns(line)).deadline_ns


def line_timeout_ns(line: Line) -> int:
    return int(line.admission.timeout_s * 1e9)


def test_a_place_elsewhere_whose_client_has_left_is_given_back(line: Line) -> None:
    line.fill()
    waiting, _ = line.wait()
    line.turn()
    waiting.leave()
    line.turn()
    line.admission.hear(granted_there(1))
    assert line.turn().withdrawn == [1]


def test_a_grant_whose_client_has_left_is_given_back(line: Line) -> None:
    line.fill()
    waiting, waiter = line.wait()
    line.turn()
    waiting.leave()
    waiting.leave()
    assert line.turn().withdrawn == [1]
    line.grant(1, A)
    assert waiter.choice is None
    assert line.turn().withdrawn == [1]


def test_a_client_that_leaves_before_the_turn_is_never_offered(line: Line) -> None:
    line.fill()
    line.wait()[0].leave()
    line.turns.turn()
    assert line.sent == []


def test_its_time_is_over(line: Line) -> None:
    line.fill()
    _, waiter = line.wait()
    line.turn()
    line.frontend.time.advance(901)
    assert isinstance(waiter.error, QueueTimeout)
    line.turns.turn()
    assert line.sent[-1].withdrawn == [1]
    assert line.frontend.total(TotalColumn.QUEUE_TIMEOUT) == 1


def test_a_full_queue_refuses_with_the_time_to_come_again(line: Line) -> None:
    line.fill()
    _, waiter = line.wait()
    line.turn()
    line.admission.hear(wire.Grants(refused=[wire.Refusal(1, 17, "full")]))
    assert isinstance(waiter.error, QueueFull)
    assert waiter.error.retry_after_s == 17
    assert line.frontend.total(TotalColumn.QUEUE_FULL) == 1


def test_a_lost_ticket_is_chosen_for_again(line: Line) -> None:
    held = line.fill()
    _, first = line.wait()
    _, second = line.wait()
    line.turn()
    held[0].lease.close()
    line.admission.hear(wire.Grants(lost=[1, 2]))
    assert first.choice is not None
    assert second.choice is None
    assert [ticket.number for ticket in line.turn().offered] == [2]
    for url in (A, B):
        line.table.writer.set_state(line.frontend.slots[url], State.DOWN)
    line.admission.hear(wire.Grants(lost=[2]))
    assert isinstance(second.error, NoInstance)


def test_without_a_scheduler_they_are_served_in_their_order_as_room_comes(line: Line) -> None:
    held = line.fill()
    waiters = [line.wait()[1] for _ in range(3)]
    line.alive = False
    held[0].lease.close()
    with pytest.raises(Saturated):  # a newcomer stands behind them
        line.choose()
    line.turns.turn()
    line.frontend.time.advance(TICK_S)
    assert [waiter.choice is not None for waiter in waiters] == [True, False, False]
    for choice in held[1:]:
        choice.lease.close()
    line.frontend.time.advance(TICK_S)
    assert all(waiter.choice is not None for waiter in waiters)


def test_what_a_dead_scheduler_holds_is_not_held(line: Line) -> None:
    line.cell(QueueColumn.HELD, A, 1)
    line.cell(QueueColumn.HELD, B, 1)
    line.alive = False
    assert len(line.fill()) == 4
