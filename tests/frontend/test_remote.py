"""Instances of other hosts at a frontend: leases that end, numbers that are reused, failures that are remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from broker import wire
from broker.counters import CounterColumn
from broker.types import Instance
from frontend import remote
from frontend.breaker import Breaker
from frontend.remote import GUESTS, Guests, RemoteChoice
from tests.support.waiting import eventually

SLOTS = 16


def grant(number: int, url: str = "http://10.0.0.1:8000", host: str = "thief") -> wire.RemoteGrant:
    instance = msgspec.msgpack.encode(Instance(url=url))
    return wire.RemoteGrant(number, wire.RemoteLease(f"l{number}", host), f"{host}:30000", instance, 3)


class Frontend:
    def __init__(self) -> None:
        self.ended: list[wire.RemoteLease] = []
        self.forgotten: list[str] = []
        self.breaker = Breaker(2, 5.0)
        loop = asyncio.get_running_loop()
        self.guests = Guests(
            SLOTS, self.breaker, loop, self.ended.append, lambda instance: self.forgotten.append(instance.url)
        )

    def enter(self, number: int, url: str = "http://10.0.0.1:8000", now: float = 0.0) -> RemoteChoice:
        choice = self.guests.enter(grant(number, url), now)
        assert choice is not None
        return choice


def with_loop(test: Callable[[Frontend], None]) -> None:
    async def run() -> None:
        frontend = Frontend()
        test(frontend)
        frontend.guests.close()

    asyncio.run(run())


def test_a_lease_is_held_until_its_request_ends_and_is_then_said_to_be_over_once() -> None:
    def test(frontend: Frontend) -> None:
        choice = frontend.enter(1)
        assert choice.where == "http://10.0.0.1:8000@thief:30000"
        assert choice.legs[0].lease is choice.lease is choice.suspects[0]
        assert list(frontend.guests.held) == ["l1"]
        choice.lease.answered()
        choice.lease.count(CounterColumn.GONE)
        choice.lease.close(CounterColumn.STATUS_200)
        choice.lease.close()
        assert frontend.guests.held == {}
        assert frontend.ended == [wire.RemoteLease("l1", "thief")]

    with_loop(test)


def test_an_instance_keeps_its_number_which_is_none_of_the_tables() -> None:
    def test(frontend: Frontend) -> None:
        one, two, other = frontend.enter(1), frontend.enter(2), frontend.enter(3, "http://10.0.0.2:8000")
        assert one.lease.slot == two.lease.slot != other.lease.slot
        assert frontend.guests.are_all([one.lease.slot, other.lease.slot])
        assert not frontend.guests.are_all([one.lease.slot, SLOTS - 1])

    with_loop(test)


def test_a_lease_that_ends_in_a_failure_says_so() -> None:
    def test(frontend: Frontend) -> None:
        choice = frontend.enter(1)
        frontend.breaker.failed(choice.lease.slot, choice.lease.generation, 0.0)
        choice.lease.close()
        assert [lease.failed for lease in frontend.ended] == [True]

    with_loop(test)


def test_an_instance_that_fails_again_and_again_gets_nothing_for_a_while() -> None:
    def test(frontend: Frontend) -> None:
        for number in (1, 2):
            choice = frontend.enter(number)
            frontend.breaker.failed(choice.lease.slot, choice.lease.generation, 0.0)
            choice.lease.close()
        assert frontend.guests.enter(grant(3), 1.0) is None
        assert frontend.guests.held == {}
        frontend.enter(4, now=6.0)  # the trial
        assert frontend.guests.enter(grant(5), 6.1) is None

    with_loop(test)


def test_a_grant_that_cannot_be_read_is_refused() -> None:
    def test(frontend: Frontend) -> None:
        broken = msgspec.structs.replace(grant(1), instance=b"\xc1")
        assert frontend.guests.enter(broken, 0.0) is None

    with_loop(test)


def test_numbers_are_few_and_go_to_whoever_comes_while_their_owners_are_idle() -> None:
    def test(frontend: Frontend) -> None:
        choices = [frontend.enter(k, f"http://10.0.1.{k}:80") for k in range(GUESTS)]
        assert frontend.guests.enter(grant(999, "http://10.9.9.9:80"), 0.0) is None  # all are in use
        choices[7].lease.close()
        choices[5].lease.close()
        frontend.enter(1000, "http://10.0.1.7:80").lease.close()  # used last
        late = frontend.enter(1001, "http://10.9.9.9:80")
        assert frontend.forgotten == ["http://10.0.1.5:80"]
        assert late.lease.slot == choices[5].lease.slot
        assert late.lease.generation != choices[5].lease.generation

    with_loop(test)


def test_what_is_not_used_for_long_is_forgotten_with_its_connections() -> None:
    async def run() -> None:
        before, remote.IDLE_S = remote.IDLE_S, 0.01
        try:
            frontend = Frontend()
            frontend.enter(1).lease.close()
            kept = frontend.enter(2, "http://10.0.0.2:8000")
            await eventually(lambda: frontend.forgotten, "forgotten")
            assert frontend.forgotten == ["http://10.0.0.1:8000"]
            assert not kept.lease.closed
            frontend.guests.close()
        finally:
            remote.IDLE_S = before

    asyncio.run(run())
