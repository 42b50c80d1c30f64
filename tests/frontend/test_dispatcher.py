"""Choosing: view, policy, lease, over a real table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from broker.config import Scheduler, Server
from broker.counters import CounterColumn
from broker.errors import NoInstance
from broker.policies import Loads, Picker, WholePrompts
from broker.route import RouteRequest
from broker.table import State
from broker.types import Role
from frontend.breaker import Breaker
from frontend.dispatch import TAKES, Dispatcher, make_policies
from tests.frontend.fakes import Frontend

URLS = [f"http://10.0.0.{n}:80" for n in range(4)]
REQUEST = RouteRequest(model="tiny", prompt_tokens=7)


@pytest.fixture
def frontend(tmp_path: Path) -> Iterator[Frontend]:
    with Frontend(tmp_path, *URLS) as it:
        yield it


class Scripted:
    """A policy that does something between the view and the lease, as a scheduler may."""

    def __init__(self, meanwhile: list[object]) -> None:
        self.meanwhile = meanwhile
        self.picks = 0

    def pick(self, request: RouteRequest, view: Loads) -> int:
        self.picks += 1
        if self.meanwhile:
            action = self.meanwhile.pop(0)
            assert callable(action)
            action(int(view.slots[0]))
        return int(view.slots[0])


def dispatcher(frontend: Frontend, policy: Picker) -> Dispatcher:
    return Dispatcher(frontend.run.reader, frontend.counters, {Role.MIXED: WholePrompts(policy)}, Breaker(3, 5.0))


def test_a_choice_holds_a_lease_that_counts_request_and_tokens(frontend: Frontend) -> None:
    choice = frontend.dispatcher.choose(REQUEST, (), 0.0)
    assert frontend.run.reader.counters.in_flight(choice.lease.slot) == (1, 7)
    assert frontend.slots[choice.instance.url] == choice.lease.slot
    choice.lease.close()
    assert not any(frontend.in_flight)


def test_instances_already_tried_are_avoided_while_there_are_others(frontend: Frontend) -> None:
    tried: list[int] = []
    for _ in URLS:
        choice = frontend.dispatcher.choose(REQUEST, tried, 0.0)
        assert choice.lease.slot not in tried
        tried.append(choice.lease.slot)
    assert frontend.dispatcher.choose(REQUEST, tried, 0.0).lease.slot in tried


def test_an_instance_that_changes_between_view_and_lease_is_not_taken(frontend: Frontend) -> None:
    policy = Scripted([lambda slot: frontend.run.writer.set_state(slot, State.DOWN)] * 2)
    choice = dispatcher(frontend, policy).choose(REQUEST, (), 0.0)
    assert policy.picks == 3
    assert choice.instance.url == URLS[2]
    assert frontend.counted(CounterColumn.WITHDRAWN) == 2
    assert sum(frontend.in_flight) == 1


def test_a_fleet_that_never_stands_still_ends_in_an_error_not_in_a_loop(frontend: Frontend) -> None:
    def churn(slot: int) -> None:
        frontend.run.writer.remove(slot, frontend.run.clock())
        frontend.run.admit(f"http://10.0.1.{len(policy.meanwhile)}:80", "tiny")

    # The table has 8 slots, and none of those removed has rested: the last ones come back as other states.
    policy = Scripted([])
    policy.meanwhile = [churn] * 4 + [lambda slot: frontend.run.writer.set_state(slot, State.DOWN)] * 4
    with pytest.raises(NoInstance):
        dispatcher(frontend, policy).choose(REQUEST, (), 0.0)
    assert policy.picks <= TAKES
    assert not any(frontend.in_flight)


def test_frontends_begin_their_round_at_different_places(frontend: Frontend) -> None:
    config = msgspec.structs.replace(frontend.config, scheduler=Scheduler(policy="round_robin"))
    firsts = []
    for index in range(config.server.workers):
        policies = make_policies(config, index)
        choice = Dispatcher(frontend.run.reader, frontend.counters, policies, Breaker(3, 5.0)).choose(REQUEST, (), 0.0)
        firsts.append(choice.instance.url)
        choice.lease.close()
    assert firsts == [URLS[0], URLS[2]]


def test_each_role_has_a_policy_of_its_own(frontend: Frontend) -> None:
    pairs = msgspec.structs.replace(frontend.config, server=Server(splitwise=True))
    policies = make_policies(pairs, 0)
    assert policies.keys() == {Role.PREFILL, Role.DECODE}
    assert policies[Role.PREFILL] is not policies[Role.DECODE]
