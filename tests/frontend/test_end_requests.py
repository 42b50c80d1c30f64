"""Aborting by name: which requests end, what their clients hear, and what is said of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker import wire
from broker.errors import Aborted
from broker.types import EngineKind
from frontend.control import ENDED_AT_ONCE, Control
from frontend.forward import Forward
from tests.frontend.fakes import Client, Frontend
from tests.frontend.pairs import PairFrontend
from tests.frontend.test_control import Scheduler, with_control

EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


@pytest.fixture
def frontend(tmp_path: Path) -> Iterator[Frontend]:
    with Frontend(tmp_path, "http://a:1") as it:
        yield it


def begun(frontend: Frontend, ident: bytes = b"id-1") -> tuple[Forward, Client]:
    client = Client()
    made = frontend.forward(sink=client)
    made._ident = ident
    made.begin()
    return made, client


def test_only_those_named_end_each_with_an_explicit_error(frontend: Frontend) -> None:
    clients = {name: begun(frontend, name)[1] for name in (b"a", b"b", b"c")}
    for call in frontend.http.calls:
        call.sink.start(200, [])
        call.sink.write(EVENT + EVENT + EVENT)
    assert sorted(frontend.forwarder.end_requests(["a", "chatcmpl-c", "x"])) == [("a", 2), ("chatcmpl-c", 2)]
    assert [call.cancelled for call in frontend.http.calls] == [True, False, True]
    assert [type(clients[name].heard[-1]) for name in (b"a", b"b", b"c")] == [Aborted, bytes, Aborted]
    assert sum(frontend.in_flight) == 1


def test_all_end_under_their_own_names(frontend: Frontend) -> None:
    begun(frontend, b"a")
    begun(frontend, b"b")
    assert sorted(frontend.forwarder.end_requests(None)) == [("a", 0), ("b", 0)]
    assert sum(frontend.in_flight) == 0
    assert frontend.forwarder.end_requests(None) == []


def test_one_that_has_not_begun_to_answer_is_refused(frontend: Frontend) -> None:
    _, client = begun(frontend)
    frontend.forwarder.end_requests(["id-1"])
    (error,) = client.heard
    assert (error.status, error.code) == (499, "request_aborted")


def test_a_pair_ends_by_fastdeploys_name_on_both_legs(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY) as it:
        it.pair()
        assert it.forwarder.end_requests(["chatcmpl-r-1"]) == [("chatcmpl-r-1", 0)]
        assert it.prefill.cancelled
        assert it.decode.cancelled
        assert (it.held("p"), it.held("d")) == (0, 0)


def test_the_scheduler_is_told_in_messages_that_fit() -> None:
    count = 2 * ENDED_AT_ONCE + 1

    async def test(control: Control, scheduler: Scheduler, _: list[int]) -> None:
        asked: list[list[str] | None] = []

        def end_requests(names: list[str] | None) -> list[tuple[str, int]]:
            asked.append(names)
            return [("x" * 256, n) for n in range(count if names is None else 0)]

        control.end_requests = end_requests
        scheduler.says(wire.EndRequests(5, [], every=True))
        heard: list[wire.Ended] = []
        while not heard or heard[-1].more:
            message = await scheduler.hears(wire.Ended)
            assert isinstance(message, wire.Ended)
            heard.append(message)
        assert [message.more for message in heard] == [True, True, False]
        assert [tokens for message in heard for _, tokens in message.requests] == list(range(count))
        scheduler.says(wire.EndRequests(6, ["a"]))
        assert await scheduler.hears(wire.Ended) == wire.Ended(6, [], False)
        assert asked == [None, ["a"]]

    with_control(test)


def test_an_answer_of_thousands_of_requests_arrives() -> None:
    async def test(control: Control, scheduler: Scheduler, _: list[int]) -> None:
        call = asyncio.create_task(control.abort_requests(b"{}"))
        asked = await scheduler.hears(wire.AbortRequests)
        assert isinstance(asked, wire.AbortRequests)
        body = b"x" * (wire.MAX_REPLY_BYTES - 64)
        scheduler.says(wire.Reply(asked.call, 200, body))
        assert (await call).body == body

    with_control(test)
