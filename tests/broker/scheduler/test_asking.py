"""What all frontends are asked: their answers together, and no waiting for who is gone, nor long for who is silent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from broker import wire
from broker.scheduler import asking
from broker.scheduler.asking import Asking, Question
from broker.scheduler.decisions import explained


class Frontends:
    """Two of them; the test says what they know, and who of them is silent or gone, or has not said hello."""

    def __init__(self, *, greet: bool = True) -> None:
        self.knows: dict[bytes, list[bytes]] = {b"f0": [], b"f1": []}
        self.silent: set[bytes] = set()
        self.gone: set[bytes] = set()
        self.asked: list[tuple[bytes, str]] = []
        self.lives = [(0, 1), (1, 1)]
        self.asking = Asking(self.tell, lambda: self.lives)
        if greet:
            self.greet()

    def greet(self) -> None:
        for row, peer in enumerate(self.knows):
            self.asking.enter((row, 1), peer)

    def tell(self, peer: bytes, question: Question) -> bool:
        assert isinstance(question, wire.TellDecisions)
        if peer in self.gone:
            return False
        self.asked.append((peer, question.ident))
        if peer not in self.silent:
            asyncio.get_running_loop().call_soon(self.say, peer, question.ask)
        return True

    def say(self, peer: bytes, ask: int) -> None:
        known = self.knows[peer]
        for number, told in enumerate(known, 1):
            self.asking.heard(peer, wire.Decided(ask, [told], more=number < len(known)))
        if not known:
            self.asking.heard(peer, wire.Decided(ask, []))

    def explain(self) -> Any:
        status, body = asyncio.run(explained("id-1", self.asking))
        assert status == 200
        return json.loads(body)


def test_every_frontend_is_asked_and_all_they_know_is_told() -> None:
    frontends = Frontends()
    frontends.knows = {b"f0": [b'{"n": 1}', b'{"n": 2}'], b"f1": [b'{"n": 3}']}
    said = frontends.explain()
    assert sorted(request["n"] for request in said["requests"]) == [1, 2, 3]
    assert said["silent_frontends"] == 0
    assert sorted(frontends.asked) == [(b"f0", "id-1"), (b"f1", "id-1")]


def test_those_who_are_gone_are_not_waited_for_and_the_silent_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    frontends = Frontends()
    frontends.gone = {b"f0"}
    assert frontends.explain() == {"requests": [], "silent_frontends": 0}
    monkeypatch.setattr(asking, "FRONTENDS_S", 0.05)
    frontends.silent = {b"f1"}
    assert frontends.explain() == {"requests": [], "silent_frontends": 1}


def test_an_answer_to_another_question_is_nobodys() -> None:
    frontends = Frontends()
    frontends.asking.heard(b"f0", wire.Decided(7, [b"{}"]))
    assert frontends.explain()["requests"] == []


def test_those_who_live_and_have_not_said_hello_are_asked_when_they_do() -> None:
    """They serve meanwhile: a request that was begun and is to be aborted may be theirs."""
    frontends = Frontends(greet=False)
    frontends.knows[b"f1"] = [b'{"n": 1}']

    async def explain() -> Any:
        asked = asyncio.ensure_future(explained("id-1", frontends.asking))
        await asyncio.sleep(0)  # asked: nobody can be told
        assert frontends.asked == []
        frontends.greet()
        _, body = await asked
        return json.loads(body)

    assert asyncio.run(explain()) == {"requests": [{"n": 1}], "silent_frontends": 0}
    assert frontends.asked == [(b"f0", "id-1"), (b"f1", "id-1")]


def test_those_who_live_and_never_say_hello_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FRONTENDS_S", 0.05)
    frontends = Frontends()
    frontends.lives = [(0, 1), (1, 2)]  # another life in the second row
    assert frontends.explain() == {"requests": [], "silent_frontends": 1}


def test_one_who_takes_no_more_for_the_moment_is_asked_again_the_next_time() -> None:
    frontends = Frontends()
    frontends.knows[b"f0"] = [b"{}"]
    frontends.gone = {b"f0"}
    assert frontends.explain()["requests"] == []
    frontends.gone.clear()
    assert frontends.explain()["requests"] == [{}]


def test_one_who_is_gone_from_the_roster_too_is_forgotten() -> None:
    frontends = Frontends()
    frontends.knows[b"f0"] = [b"{}"]
    frontends.gone, frontends.lives = {b"f0"}, [(1, 1)]
    assert frontends.explain()["requests"] == []
    frontends.gone.clear()
    assert frontends.explain()["requests"] == []
