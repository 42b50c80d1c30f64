"""What is told of a request on its way, in the words of the face that tells it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.errors import UpstreamBroken
from broker.faces import FD_ROUTER, PENSTOCK
from broker.types import EngineKind, RouteRequest
from frontend.pair import PairChoice
from frontend.story import Stories
from tests.frontend.pairs import PairFrontend

ROUTE = RouteRequest(model="tiny", prompt_tokens=10)
NOW = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"


@pytest.fixture
def one(tmp_path: Path) -> Iterator[PairFrontend]:
    """A single pair."""
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, prefills=1, decodes=1) as frontend:
        yield frontend


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", logger="frontend")
    return caplog


def choose(frontend: PairFrontend) -> PairChoice:
    chosen = frontend.forwarder.dispatcher.choose(ROUTE, (), 0.0)
    assert isinstance(chosen, PairChoice)
    return chosen


def test_only_a_face_with_lines_for_it_tells_stories(one: PairFrontend) -> None:
    assert Stories.of(PENSTOCK, one.run.reader) is None
    assert Stories.of(FD_ROUTER, one.run.reader) is not None


def test_an_attempt_that_ends_after_the_next_began_at_the_same_pair_is_told(
    one: PairFrontend, told: pytest.LogCaptureFixture
) -> None:
    story = Stories(FD_ROUTER, one.run.reader).begin("POST", "/v1/completions", "::ffff:10.0.0.9", [("req_id", "q")])
    story.parsed(stream=True)
    first = choose(one)
    story.chosen(first.legs)
    second = choose(one)
    story.chosen(second.legs)
    first.lease.close()
    first.prefill.lease.close()
    second.prefill.lease.close()  # its first chunk
    second.lease.close()
    story.ended(200, 1.5, completed=True)
    lines = [record.getMessage().removeprefix("[req_id:q] ") for record in told.records]
    assert [line for line in lines if "ts_ms" not in line] == [
        "Parsing completed; starting worker selection.",
        "select worker (prefill): http://p0:80, tokens: 10",
        "select worker (decode): http://d0:80, count: 1",
        "select worker (prefill): http://p0:80, tokens: 20",
        "select worker (decode): http://d0:80, count: 2",
        "release worker: http://d0:80, count: 1",
        "[prefill] release in defer (fallback) url=http://p0:80, isStream=true",
        "release worker: http://p0:80, count: 1",
        "release prefill tokens: http://p0:80, tokens: 10",
        "[prefill] first chunk received, release counter url=http://p0:80",
        "release worker: http://p0:80, count: 0",
        "release prefill tokens: http://p0:80, tokens: 0",
        "release worker: http://d0:80, count: 0",
        "Request completed successfully.",
        "[POST] /v1/completions HTTP/1.1 200 1.5s 10.0.0.9",
    ]


def test_a_pairs_failure_is_said_of_the_leg_that_failed(one: PairFrontend, told: pytest.LogCaptureFixture) -> None:
    story = Stories(FD_ROUTER, one.run.reader).begin("POST", "/v1/completions", "")
    choice = choose(one)
    story.chosen(choice.legs)
    told.clear()
    choice.suspects = (choice.prefill.lease,)
    story.attempt_failed(1, 3, choice, UpstreamBroken("gone").message)
    choice.suspects = (choice.lease,)
    story.attempt_failed(1, 3, choice, "refused")
    assert told.messages == [
        "Prefill request failed for http://p0:80: gone",
        "Decode request failed for http://d0:80: refused",
    ]
    for lease in (choice.lease, choice.prefill.lease):
        lease.close()
