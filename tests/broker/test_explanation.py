"""`penstock explain`: what people read. What is in it is `frontend.explain`'s, and tested there."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner

from broker import cli, explanation

A, B = "http://a:1", "http://b:1"
SEEN = {
    "role": "mixed",
    "policy": "prefix_cost",
    "candidates": 40,
    "left_out": [B],
    "blocks": 11.2,
    "reason": None,
    "nearest": [
        {
            "instance": A,
            "chosen": True,
            "in_flight": 3,
            "tokens": None,
            "running": None,
            "waiting": None,
            "report_age_ms": None,
            "score": 0.5,
            "blocks": 11,
        }
    ],
}
REQUEST = {
    "id": "id-1",
    "request_id": "cmpl-1",
    "frontend": 1,
    "path": "/v1/completions",
    "model": "tiny",
    "instance": B,
    "began_s_ago": 2.04,
    "queue_ms": 12.5,
    "stolen_from": A,
    "rescued_from": None,
    "tries": 1,
    "first_byte_ms": 20.0,
    "duration_ms": 31.25,
    "status": 200,
    "outcome": "done",
    "steps": [
        {"at_ms": 0.1, "step": "queued", "home": A, **SEEN},
        {"at_ms": 12.6, "step": "granted", "waited_ms": 12.5, "home": A},
        {"at_ms": 12.7, "step": "sent", "instance": B},
    ],
}
TEXT = """\
request id-1 (cmpl-1): /v1/completions, model tiny; frontend 1, 2.0 s ago
  done, status 200, at http://b:1, first byte after 20.0 ms, 31.2 ms in all, 1 try, 12.5 ms in line, stolen from http://a:1
      +0.1 ms  no candidate had room; in line for http://a:1: the choice of prefix_cost among 40, for a prompt of 11.2 blocks
              instance      in_flight  blocks  score
              * http://a:1  3          11      0.50
              and 39 more
              left out: http://b:1
     +12.6 ms  granted, from the line of http://a:1
     +12.7 ms  sent to http://b:1
"""  # noqa: E501 as it is printed


def told(*requests: dict[str, Any], silent: int = 0) -> str:
    answer = {"requests": list(requests), "silent_frontends": silent}
    return "".join(line + "\n" for line in explanation.told(answer))


def test_a_request_is_told_in_its_order() -> None:
    assert told(REQUEST) == TEXT


def test_several_requests_of_one_name_are_told_apart() -> None:
    assert told(REQUEST, REQUEST, silent=1) == f"{TEXT}\n{TEXT}(1 frontends could not be asked)\n"


def test_failures_and_rescues_are_told_with_their_reasons() -> None:
    steps = [
        {"at_ms": 1.0, "step": "failed", "instance": A, "reason": "refused"},
        {"at_ms": 2.0, "step": "rescued", "from": A},
        {"at_ms": 3.0, "step": "sent", "legs": [{"instance": A, **SEEN, "role": "prefill"}, {"instance": B}]},
    ]
    fresh = {"outcome": "under way", "status": None, "first_byte_ms": None, "tries": 2, "rescued_from": A}
    text = told({**REQUEST, **fresh, "instance": None, "model": None, "steps": steps})
    assert "under way, status -, at no instance, no byte yet" in text
    assert "2 tries" in text
    assert f"rescued from {A}" in text
    assert f"failed at {A}: refused" in text
    assert f"taken back from {A}" in text
    assert f"prefill: {A}: the choice of prefix_cost" in text


def test_the_command_is_among_the_others_and_says_what_it_wants() -> None:
    runner = CliRunner()
    assert "explain" in runner.invoke(cli.cli, ["--help"]).output
    text = runner.invoke(cli.cli, ["explain", "--help"]).output
    assert "X-Request-Id" in text
    assert runner.invoke(cli.cli, ["explain"]).exit_code == 2
