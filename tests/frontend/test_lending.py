"""What a conduit has sent and counted is its request's: its silence, its tokens, its line in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgpack
import pytest

from broker.config import Timeouts
from broker.errors import ClientTooSlow, UpstreamTimeout
from broker.wire import CHUNK, STEP_TAG
from frontend import conduit
from frontend.forward import Forward
from tests.frontend.conduits import EVENT, USAGE
from tests.frontend.fakes import Client, Frontend

if TYPE_CHECKING:
    from frontend._conduit import Conduit

if conduit.compiled is None:
    pytest.skip("it was not compiled here", allow_module_level=True)
short = conduit.compiled

LIFE = bytes(16)
IDLE_S = 10.0
HEAD = [(b"content-type", b"text/event-stream")]


class Lender(Client):
    """A client whose connection is nobody's."""

    def conduit(self) -> Conduit:
        made: Conduit = short.Conduit(-1)
        return made


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Frontend]:
    with Frontend(tmp_path, "http://10.0.0.1:80", timeouts=Timeouts(idle_secs=IDLE_S)) as frontend:
        frontend.client = Lender()
        yield frontend


def lent(one: Frontend, *events: bytes) -> tuple[Forward, Conduit]:
    """A stream of which these have come, and by what the next ones go."""
    forward = one.begin()
    forward.start(200, HEAD)
    for event in events or (EVENT,):
        forward.write(event)
    made = forward.conduit()
    assert made is not None
    return forward, made


def flow(one: Frontend, through: Conduit, *events: bytes) -> None:
    conduits = short.Conduits()
    conduits.add(1, through)
    deltas = [[1, through.next + number, CHUNK, event] for number, event in enumerate(events)]
    assert short.step(msgpack.packb([STEP_TAG, LIFE, deltas]), LIFE, conduits, one.time.now) == ()


def test_silence_is_counted_from_the_last_event_whichever_way_it_went(one: Frontend) -> None:
    forward, way = lent(one)
    for _ in range(3):
        one.time.advance(0.9 * IDLE_S)
        flow(one, way, EVENT)
    one.time.advance(0.9 * IDLE_S)
    forward.write(EVENT)
    one.time.advance(0.9 * IDLE_S)
    assert one.client.heard[-1] == EVENT
    one.time.advance(0.2 * IDLE_S)
    assert isinstance(one.client.heard[-1], UpstreamTimeout)
    assert one.http.last.cancelled
    assert not any(one.in_flight)


def test_silence_goes_on_when_a_stream_is_lent(one: Frontend) -> None:
    forward, _ = lent(one)
    one.time.advance(0.9 * IDLE_S)
    assert forward.conduit() is not None
    one.time.advance(0.2 * IDLE_S)
    assert isinstance(one.client.heard[-1], UpstreamTimeout)


def test_a_client_that_does_not_read_what_flowed_is_to_blame(one: Frontend) -> None:
    forward, way = lent(one)
    one.time.advance(0.5 * IDLE_S)
    flow(one, way, EVENT)
    forward.pause()
    one.time.advance(1.1 * IDLE_S)
    assert isinstance(one.client.heard[-1], ClientTooSlow)


def test_tokens_so_far_are_those_of_both_ways(one: Frontend) -> None:
    forward, way = lent(one, EVENT, EVENT)  # the first of a chat names the role
    assert forward.tokens_so_far == 1
    flow(one, way, EVENT, EVENT)
    assert forward.tokens_so_far == 3
    forward.write(EVENT)
    assert forward.tokens_so_far == 4
    again = forward.conduit()
    assert again is not None
    flow(one, again, EVENT)
    assert forward.tokens_so_far == 5
    assert one.forwarder.end_requests(["id-1"]) == [("id-1", 5)]


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("last_by", ["finish", "cancel"])
def test_the_log_line_has_what_went_both_ways(
    one: Frontend, caplog: pytest.LogCaptureFixture, last_by: str, behind: int
) -> None:
    caplog.set_level(logging.INFO, "penstock.access")
    forward, way = lent(one)
    flow(one, way, EVENT, EVENT)
    forward.write(EVENT)
    again = forward.conduit()
    assert again is not None
    flow(one, again, *[EVENT] * 5, USAGE, *[b"data: [DONE]\n\n"] * behind)
    getattr(forward, last_by)()
    (line,) = (record.getMessage() for record in caplog.records)
    assert f" bytes={9 * len(EVENT) + len(USAGE) + behind * 14} tokens=42 " in line


def test_nothing_is_lent_before_an_answer_flows_or_while_its_client_is_paused_or_after_its_end(one: Frontend) -> None:
    forward = one.begin()
    assert forward.conduit() is None
    forward.start(200, HEAD)
    assert forward.conduit() is None
    forward.write(EVENT)
    assert forward.conduit() is not None
    forward.pause()
    assert forward.conduit() is None
    forward.resume()
    assert forward.conduit() is not None
    forward.finish()
    assert forward.conduit() is None


def test_whose_client_lends_nothing_lends_nothing(one: Frontend) -> None:
    forward = one.begin(sink=Client())
    forward.start(200, HEAD)
    forward.write(EVENT)
    assert forward.conduit() is None
