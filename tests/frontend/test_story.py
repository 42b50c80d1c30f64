"""What is told of a request on its way, in the words of the face that tells it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.config import Scheduler
from broker.errors import UpstreamBroken
from broker.faces import FD_ROUTER, PENSTOCK
from broker.route import RouteRequest
from broker.types import EngineKind
from frontend.pair import PairChoice
from frontend.story import Stories
from tests.frontend.fakes import Frontend
from tests.frontend.pairs import PairFrontend

A, B = "http://10.0.0.1:80", "http://10.0.0.2:80"
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


def test_a_client_that_leaves_within_its_answer_is_told_as_the_original_does(
    one: PairFrontend, told: pytest.LogCaptureFixture
) -> None:
    stories = Stories(FD_ROUTER, one.run.reader)
    stories.begin("POST", "/p", "").ended(499, 0.0, completed=False, left=True)
    assert [line.split(" ")[0] for line in told.messages] == ["[POST]"]
    told.clear()
    stories.begin("POST", "/p", "").ended(200, 0.0, completed=True, left=True)
    assert told.messages[:2] == ["scanner error: context canceled", "Request completed successfully."]


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


def test_how_prefixes_and_load_were_weighed_is_told_of_each_choice(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    told.set_level("DEBUG", logger="frontend")
    settings = Scheduler(policy="cache_aware", load_balance_weight=0.5)
    with Frontend(tmp_path, A, B, scheduler=settings) as frontend:
        stories = Stories(FD_ROUTER, frontend.run.reader)
        asked = RouteRequest(model="tiny", prompt="p" * 128, prompt_tokens=32)
        held = []
        for _ in range(3):
            choice = frontend.dispatcher.choose(asked, (), 0.0)
            frontend.dispatcher.placed(asked, choice)
            stories.begin("POST", "/v1/completions", "").chosen(choice.legs)
            held.append(choice)
        home = held[0].instance.url
        assert [choice.instance.url == home for choice in held] == [True, True, False]  # the third by load alone
        lines = [line.partition(" ts_ms")[0] for line in told.messages if "cache-aware" in line]
        assert lines == [
            f"cache-aware score: worker={A} hit=0.0 loadRatio=0.000 score=1.000",
            f"cache-aware score: worker={B} hit=0.0 loadRatio=0.000 score=1.000",
            "cache-aware prefill: final strategy: cache_aware_scoring, "
            f"selected={home}, loads=map[{A}:0 {B}:0], hitRatios=map[].",
            *(
                f"cache-aware score: worker={url} hit={100.0 if url == home else 0.0} "
                f"loadRatio={float(url == home):.3f} score={0.5 if url == home else 1.0:.3f}"
                for url in (A, B)
            ),
            "cache-aware prefill: final strategy: cache_aware_scoring, "
            f"selected={home}, loads=map[{A}:{int(home == A)} {B}:{int(home == B)}], hitRatios=map[{home}:100].",
            "cache-aware prefill: final strategy: process_tokens, reason: load imbalanced, "
            f"loads=map[{A}:{2 * (home == A)} {B}:{2 * (home == B)}].",
        ]
        for choice in held:
            choice.lease.close()
