"""Requests for pairs that find no room: they stand in line like any other, hold nothing, and get both legs at once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest

from broker import wire
from broker.config import Scheduler
from broker.counters import CounterColumn
from broker.engines.pd import PAIRINGS
from broker.errors import ConnectFailed
from broker.route import RouteRequest
from broker.table import QueueColumn, State
from broker.types import EngineKind, FastDeployFields, Role
from frontend.admission import Admission
from frontend.forward import Forward
from frontend.forwarder import Forwarder
from frontend.pair import Pairer
from frontend.pairline import TURNS
from frontend.partners import Partners
from tests.frontend.fakes import Client
from tests.frontend.pairs import PairFrontend
from tests.frontend.test_admission import Turns

P0, P1, D0, D1 = "http://p0:80", "http://p1:80", "http://d0:80", "http://d1:80"
ROUTE = RouteRequest(model="tiny", prompt_tokens=10)


class Scene(PairFrontend):
    """Each instance takes one request; the test plays engines and scheduler."""

    def __init__(self, path: Path, prefills: int = 1, decodes: int = 1) -> None:
        settings: Any = {"prefill_policy": "process_tokens", "instance_capacity": 1}
        super().__init__(path, EngineKind.FASTDEPLOY, prefills, decodes, scheduler=Scheduler(**settings))
        turns = Turns(self)
        self.turn = turns.turn
        loop = cast("asyncio.AbstractEventLoop", turns)
        self.sent: list[wire.Tickets] = []
        self.run.writer.beat(1 << 62)
        self.admission = Admission(self.config, self.run.reader, self.dispatcher, self.counters, 1, loop, self._send)
        partners = Partners(self.run.reader, PAIRINGS)
        self.pairer = Pairer(self.dispatcher, partners, PAIRINGS, Random(1), loop, line=self.admission)
        self.forwarder = Forwarder(
            self.config, self.pairer, self.counters, self.http, self.native, loop, self.time.time
        )

    def _send(self, message: wire.Tickets) -> bool:
        self.sent.append(message)
        return True

    def ask(self) -> tuple[Forward, Client]:
        client = Client()
        return self.pair(sink=client), client

    def said(self) -> wire.Tickets:
        """The one message of a turn."""
        self.turn()
        (message,) = self.sent
        self.sent.clear()
        return message

    def ticket(self) -> wire.Ticket:
        (ticket,) = self.said().offered
        return ticket

    def grant(self, ticket: wire.Ticket, url: str) -> None:
        self.admission.hear(wire.Grants([wire.Grant(ticket.number, self.slots[url], 1, ticket.home)]))

    def hold(self, url: str) -> Any:
        """A request of somebody else's at one instance."""
        role = Role.PREFILL if "//p" in url else Role.DECODE
        route = self.pairer.asked(ROUTE, role)
        choice = self.dispatcher.claim(route, self.slots[url], 1, 0.0)
        assert choice is not None
        return choice.lease

    def cell(self, column: QueueColumn, url: str, value: int) -> None:
        self.run.writer.queue[column * self.run.writer.slots + self.slots[url]] = value


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    it = Scene(tmp_path)
    yield it
    it.close()


def test_with_room_a_pair_is_made_and_nothing_is_said_to_anybody(scene: Scene) -> None:
    _, client = scene.ask()
    scene.decode.answer(b"done")
    assert client.heard == [200, b"done", "end"]
    scene.turn()
    assert scene.sent == []


@pytest.mark.parametrize(("full", "role"), [(P0, Role.PREFILL), (D0, Role.DECODE)])
def test_a_full_leg_is_waited_for_and_the_other_one_is_not_held(scene: Scene, full: str, role: Role) -> None:
    lease = scene.hold(full)
    scene.ask()
    ticket = scene.ticket()
    assert (ticket.role, ticket.home) == (role, scene.slots[full])
    assert ticket.prompt == (10 if role is Role.PREFILL else 1)
    assert not ticket.abroad
    assert scene.http.calls == []
    assert (scene.held("p"), scene.held("d")) == ((1, 0) if role is Role.PREFILL else (0, 1))
    lease.close()
    scene.grant(ticket, full)
    assert [call.instance.url for call in scene.http.calls] == [P0, D0]
    assert (scene.held("p"), scene.held("d")) == (1, 1)
    assert scene.said().taken == [ticket.number]


def test_a_granted_leg_whose_partner_is_full_is_given_back_and_the_partner_is_waited_for(scene: Scene) -> None:
    prefill, decode = scene.hold(P0), scene.hold(D0)
    scene.ask()
    first = scene.ticket()
    assert first.role is Role.PREFILL
    scene.cell(QueueColumn.HELD, P0, 1)
    prefill.close()
    scene.turn()
    scene.sent.clear()
    scene.grant(first, P0)
    assert scene.http.calls == []
    assert scene.held("p") == 0
    message = scene.said()
    (second,) = message.offered
    assert message.taken == [first.number]
    assert message.freed, "the next in line hears of the place"
    assert (second.role, second.offered_ns, second.deadline_ns) == (Role.DECODE, first.offered_ns, first.deadline_ns)
    scene.cell(QueueColumn.HELD, P0, 0)
    decode.close()
    scene.grant(second, D0)
    assert [call.instance.url for call in scene.http.calls] == [P0, D0]


def test_it_does_not_turn_for_ever(scene: Scene) -> None:
    """Both legs are always full for one another: in the end it is sent, and waits inside the engine."""
    leases = {P0: scene.hold(P0), D0: scene.hold(D0)}
    scene.ask()
    ticket = scene.ticket()
    for _ in range(TURNS):
        mine, other = (P0, D0) if ticket.role is Role.PREFILL else (D0, P0)
        leases[mine].close()
        scene.grant(ticket, mine)
        assert scene.http.calls == []
        leases[mine] = scene.hold(mine)
        ticket = scene.ticket()
        assert (ticket.role is Role.PREFILL) == (other == P0)
    leases[P0].close()
    scene.grant(ticket, P0)
    assert [call.instance.url for call in scene.http.calls] == [P0, D0]
    assert (scene.held("p"), scene.held("d")) == (1, 2)


def test_a_client_that_leaves_the_line_gives_up_its_place_whichever_leg_it_waits_for(scene: Scene) -> None:
    prefill, _ = scene.hold(P0), scene.hold(D0)
    forward, _ = scene.ask()
    first = scene.ticket()
    prefill.close()
    scene.grant(first, P0)
    second = scene.ticket()
    forward.cancel()
    forward.cancel()
    assert scene.said().withdrawn == [second.number]
    assert (scene.held("p"), scene.held("d")) == (0, 1)


def test_its_time_is_over_for_both_legs_together(scene: Scene) -> None:
    scene.hold(D0)
    _, client = scene.ask()
    scene.turn()
    scene.time.advance(901)
    (error,) = client.heard
    assert error.code == "queue_timeout"


def test_a_leg_that_fits_no_partner_is_given_back_for_one_that_does(tmp_path: Path) -> None:
    """The decode granted is of another size than the only prefill: the pair is chosen anew."""
    scene = Scene(tmp_path)
    scene.admit("http://d9:80", Role.DECODE, fastdeploy=FastDeployFields(tp_size=8))
    lease = scene.hold(D0)
    scene.ask()
    ticket = scene.ticket()
    assert ticket.role is Role.DECODE
    lease.close()
    scene.grant(ticket, "http://d9:80")
    assert [call.instance.url for call in scene.http.calls] == [P0, D0]
    assert scene.run.reader.live_at(scene.slots["http://d9:80"]) == 0
    scene.close()


def test_when_nobody_is_left_to_make_a_pair_it_ends(scene: Scene) -> None:
    lease = scene.hold(P0)
    _, client = scene.ask()
    ticket = scene.ticket()
    scene.run.writer.set_state(scene.slots[D0], State.DOWN)
    lease.close()
    scene.grant(ticket, P0)
    (error,) = client.heard
    assert error.status == 503
    assert (scene.held("p"), scene.held("d")) == (0, 0)


def test_another_pair_with_room_is_taken_instead_of_waiting(tmp_path: Path) -> None:
    scene = Scene(tmp_path, prefills=2, decodes=2)
    held = [scene.hold(P0), scene.hold(D1)]
    scene.ask()
    assert [call.instance.url for call in scene.http.calls] == [P1, D0]
    for lease in held:
        lease.close()
    scene.close()


def test_what_was_only_tried_is_no_request(scene: Scene) -> None:
    scene.hold(D0)
    scene.ask()
    slot = scene.slots[P0]
    counts = [scene.counters.load(column, slot) for column in (CounterColumn.STARTED, CounterColumn.WITHDRAWN)]
    assert counts[0] == counts[1] > 0


def test_without_a_scheduler_pairs_are_served_as_room_comes(scene: Scene) -> None:
    leases = [scene.hold(D0)]
    asked = [scene.ask() for _ in range(2)]
    scene.turn()
    scene.run.writer.beat(-(1 << 62))
    leases[0].close()
    scene.time.advance(0.02)
    assert len(scene.http.calls) == 2
    scene.decode.answer(b"done")
    scene.prefill.sink.finish()
    scene.time.advance(0.02)
    assert len(scene.http.calls) == 4
    assert asked[0][1].heard == [200, b"done", "end"]


def test_a_retry_of_a_pair_does_not_wait_again(scene: Scene) -> None:
    scene.ask()
    scene.decode.sink.fail(ConnectFailed("refused"))
    assert len(scene.http.calls) == 4  # the same pair once more, full or not
    scene.turn()
    assert not any(message.offered for message in scene.sent)
