"""A prompt is noted at the instance that really gets it, and nowhere else: by grants, retries and rescues too."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from broker import wire
from broker.config import Scheduler
from broker.errors import ConnectFailed
from broker.route import RouteRequest
from frontend.admission import Admission
from frontend.forward import Forward
from frontend.forwarder import Forwarder
from frontend.upstream.base import UpstreamRequest
from tests.frontend.fakes import Client, Frontend
from tests.frontend.test_admission import Turns

A, B = "http://10.0.0.1:80", "http://10.0.0.2:80"
BLOCKS = 4
PROMPT = "".join(f"{word:08d}" for word in range(8 * BLOCKS))
"""Of blocks of 64 characters."""


class Scene:
    """Two instances that take one request each; the test plays engines and scheduler."""

    def __init__(self, path: Path, policy: str) -> None:
        settings: Any = {"policy": policy, "instance_capacity": 1, "balance_abs_threshold": 100}
        self.frontend = Frontend(path, A, B, scheduler=Scheduler(**settings))
        turns = Turns(self.frontend)
        self.turn = turns.turn
        loop = cast("asyncio.AbstractEventLoop", turns)
        self.sent: list[wire.Tickets] = []
        frontend = self.frontend
        frontend.run.writer.beat(1 << 62)
        self.admission = Admission(
            frontend.config, frontend.run.reader, frontend.dispatcher, frontend.counters, 1, loop, self._send
        )
        self.forwarder = Forwarder(
            frontend.config,
            self.admission,
            frontend.counters,
            frontend.http,
            frontend.native,
            loop,
            frontend.time.time,
        )

    def _send(self, message: wire.Tickets) -> bool:
        self.sent.append(wire.decode(wire.from_frontend, wire.encode(message)))  # type: ignore[arg-type]  # it is one
        return True

    def ask(self, prompt: str) -> Forward:
        route = RouteRequest(model="tiny", prompt=prompt, prompt_tokens=len(prompt) // 4)
        request = UpstreamRequest(path="/v1/completions", headers=[], body=b"{}")
        forward = self.forwarder.forward(b"id", route, request, Client())
        forward.begin()
        return forward

    def fill(self) -> dict[str, Forward]:
        """Both instances; who has which."""
        found = {}
        for number in range(2):
            forward = self.ask(f"{number} fills")
            found[self.frontend.http.last.instance.url] = forward
        assert found.keys() == {A, B}
        return found

    def ticket(self) -> wire.Ticket:
        """Of the one request that waits."""
        self.turn()
        (message,) = [message for message in self.sent if message.offered]
        self.sent.clear()
        (ticket,) = message.offered
        return ticket

    def grant(self, ticket: wire.Ticket, url: str) -> None:
        self.admission.hear(wire.Grants([wire.Grant(ticket.number, self.frontend.slots[url], 1, ticket.home)]))

    def who_has(self, prompt: str) -> dict[str, int]:
        """Leading blocks, by URL."""
        assert self.frontend.prefixes is not None
        depths = self.frontend.prefixes.match(RouteRequest(model="tiny", prompt=prompt + " ")).depths
        return {url: int(depths[slot]) for url, slot in self.frontend.slots.items() if depths[slot]}

    def tokens(self, url: str) -> int:
        """Prompt tokens that are counted there."""
        return self.frontend.run.reader.counters.in_flight(self.frontend.slots[url])[1]

    def url(self, slot: int) -> str:
        return next(url for url, its in self.frontend.slots.items() if its == slot)


@pytest.fixture(params=["prefix_cost", "cache_aware", "remote_cache_aware"])
def scene(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    it = Scene(tmp_path, request.param)
    yield it
    it.frontend.close()


def other(url: str) -> str:
    return B if url == A else A


def test_a_request_that_waits_is_noted_nowhere_and_then_where_its_grant_is(scene: Scene) -> None:
    held = scene.fill()
    scene.ask(PROMPT)
    ticket = scene.ticket()
    assert scene.who_has(PROMPT) == {}
    thief = other(scene.url(ticket.home))
    held[thief].cancel()
    scene.grant(ticket, thief)
    assert scene.frontend.http.last.instance.url == thief
    assert scene.who_has(PROMPT) == {thief: BLOCKS}


def test_a_choice_that_was_full_and_given_back_leaves_no_note(scene: Scene) -> None:
    scene.ask(PROMPT)
    home = scene.frontend.http.last.instance.url
    scene.ask(PROMPT + "goes on")
    assert scene.frontend.http.last.instance.url == other(home)
    assert scene.who_has(PROMPT) == {home: BLOCKS, other(home): BLOCKS}
    scene.ask(PROMPT + "and on")
    assert set(scene.ticket().cached.values()) == {len(PROMPT) // 4}


def test_a_ticket_says_who_has_how_much_of_its_prompt(scene: Scene) -> None:
    """And the lease is taken for what the instance granted has to compute, where the policy counts so."""
    first = scene.ask(PROMPT[:128])
    home = scene.frontend.http.last.instance.url
    scene.ask("something else")
    scene.ask(PROMPT)
    ticket = scene.ticket()
    assert ticket.prompt == len(PROMPT) // 4
    assert ticket.cached == {scene.frontend.slots[home]: 128 // 4}
    first.cancel()
    scene.grant(ticket, home)
    counts_uncached = scene.frontend.config.scheduler.policy == "prefix_cost"
    assert scene.tokens(home) == len(PROMPT) // 4 - (128 // 4 if counts_uncached else 0)


def test_a_retry_is_noted_where_it_goes(scene: Scene) -> None:
    scene.ask(PROMPT)
    first = scene.frontend.http.last
    first.sink.fail(ConnectFailed("refused"))
    assert scene.frontend.http.last.instance.url == other(first.instance.url)
    assert scene.who_has(PROMPT) == {A: BLOCKS, B: BLOCKS}


def test_a_rescued_request_is_noted_where_it_goes(scene: Scene) -> None:
    forward = scene.ask(PROMPT)
    better = other(scene.frontend.http.last.instance.url)
    route = RouteRequest(model="tiny", prompt=PROMPT, prompt_tokens=8)
    choice = scene.admission.claim(route, scene.frontend.slots[better], 1)
    assert choice is not None
    forward.rescue(choice)
    assert scene.who_has(PROMPT)[better] == BLOCKS


def test_what_a_ticket_says_of_its_prompt_is_bounded_and_holds_its_home(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "prefix_cost")
    every = {slot: 1000 - slot for slot in range(100)}
    route = RouteRequest(model="tiny", prompt=PROMPT, prompt_tokens=1000)
    scene.frontend.dispatcher.cached = lambda _: every  # type: ignore[method-assign]  # a fleet larger than the table
    said = scene.admission.cached(route, 99)
    assert len(said) == wire.MOST_CACHED
    assert said == {**{slot: every[slot] for slot in range(wire.MOST_CACHED - 1)}, 99: every[99]}
    scene.frontend.close()
