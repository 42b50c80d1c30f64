"""Section 5.5: prompts cut by a tokenizer service, and what becomes of them when it does not serve."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.blackbox import engine as scripts
from tests.blackbox.engine import Engine, Handler
from tests.blackbox.router import Router

FALLBACK = r"\[WARN\] .*: cache-aware prefill: tokenizer failed, fallback to char tokens: .+"
SCORED = (
    r"\[INFO\] .*: \[req_id:{}\] cache-aware prefill: final strategy: cache_aware_scoring, .*hitRatios=map\[{}\]\. .*"
)


def words(handler: Handler) -> None:
    """A token for each word."""
    text = handler.server.engine.asked[-1].json()["text"]
    handler.reply(200, json.dumps({"input_ids": [len(word) for word in text.split()], "count": 1}).encode())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Router, Engine]]:
    """A router that cuts prompts into blocks of two tokens, and the service it asks; one engine."""
    service = Engine("mixed", {})
    config = {
        "scheduler": {
            "policy": "cache_aware",
            "cache-block-size": 2,
            "tokenizer-url": f"127.0.0.1:{service.port}",  # neither scheme nor path
            "tokenizer-timeout-secs": 2.0,
        },
        "log": {"level": "debug"},
    }
    with Router(tmp_path_factory.mktemp("tokens"), config=config) as router:
        router.engine()
        yield router, service
    service.close()


def hits(router: Router, text: str, name: str) -> int:
    """Of how many percent of a prompt the log says that they had been sent before."""
    assert router.chat(text, req_id=name).status == 200
    found = router.await_line(SCORED.format(name, r"(?:http://\S+:(\d+))?"), "out")
    return int(found[1] or 0)


def test_the_service_is_asked_for_the_prompt_three_times_over(site: tuple[Router, Engine]) -> None:
    router, service = site
    service.script = words
    assert router.chat("  a bb  ccc dddd ").status == 200
    asked = service.asked[-1]
    assert asked.path == "/tokenize"
    assert asked.header("Content-Type") == "application/json"
    assert asked.json() == dict.fromkeys(("text", "prompt", "message"), "a bb  ccc dddd")


def test_blocks_are_of_the_services_tokens(site: tuple[Router, Engine]) -> None:
    """Tokens are the words' lengths here: as characters no two of the prompts have a block in common."""
    router, service = site
    service.script = words
    assert hits(router, "p qq rrr ssss", "t1") in (0, 100)  # the lengths that the test before had, if it ran
    assert hits(router, "v ww xxxxx zzzzzz", "t2") == 50
    assert hits(router, "x yy zzz uuuu", "t3") == 100
    assert hits(router, "x yy zzz", "t4") == 100  # one whole block; the rest is ignored


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("500", scripts.refuse(500)),
        ("302", scripts.refuse(302, b"", Location="/elsewhere")),
        ("empty", scripts.refuse(200, b'{"input_ids": []}')),
        ("missing", scripts.refuse(200, b'{"ids": [1]}')),
        ("words", scripts.refuse(200, b'{"input_ids": ["a"]}')),
        ("floats", scripts.refuse(200, b'{"input_ids": [1.5]}')),
        ("huge", scripts.refuse(200, b'{"input_ids": [99999999999999999999]}')),
        ("html", scripts.refuse(200, b"<html>")),
        ("cut", scripts.reset),
        ("slow", scripts.hang),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_without_tokens_characters_serve(site: tuple[Router, Engine], name: str, script: scripts.Script) -> None:
    """The second prompt has three of the first one's four blocks of two characters."""
    router, service = site
    service.script = script
    before = len(router.out)
    head = f"{name}-text"[:6]
    hits(router, head + "yz", f"f1-{name}")
    assert hits(router, head + "YZ", f"f2-{name}") == 75
    assert len(re.findall(FALLBACK, router.out[before:])) == 2


def test_a_service_that_is_gone_is_done_without(site: tuple[Router, Engine]) -> None:
    router, service = site
    service.close()
    assert hits(router, "nobody is there", "g1") == 0
    assert hits(router, "nobody is there", "g2") == 100
    router.await_line(FALLBACK, "out")


def test_no_text_leads_to_the_fewest_tokens(site: tuple[Router, Engine]) -> None:
    router, _ = site
    assert router.post("/v1/chat/completions", {"messages": [], "req_id": "n1"}).status == 200
    router.await_line(
        r"\[INFO\] .*: \[req_id:n1\] cache-aware prefill: final strategy: process_tokens, "
        r"reason: tokenize failed: empty prompt for tokenizer\. ts_ms=.*",
        "out",
    )


def test_each_candidates_score_is_told_when_debugging(site: tuple[Router, Engine]) -> None:
    router, _ = site
    hits(router, "a score of its own", "s1")
    router.await_line(
        rf"\[DEBUG\] .*: \[req_id:s1\] cache-aware score: worker={router.engines[0].url} "
        r"hit=0\.0 loadRatio=0\.000 score=1\.000",
        "out",
    )
