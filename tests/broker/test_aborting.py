"""Whom `POST /v1/abort_requests` means, and one answer out of many."""

from __future__ import annotations

from typing import Any

import pytest

from broker.aborting import MOST_IDS, NEITHER, Aborted, Failure, by_name, merged, read_result, wanted
from broker.errors import BadRequest


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (b'{"req_ids":["a","b","a"]}', ["a", "b"]),
        (b'{"abort_all":true}', None),
        (b'{"abort_all":true,"req_ids":["a"]}', None),
        (b'{"abort_all":false,"req_ids":["a"],"more":1}', ["a"]),
    ],
)
def test_a_body_names_requests_or_means_all(body: bytes, ids: list[str] | None) -> None:
    assert wanted(body) == ids


@pytest.mark.parametrize("body", [b"{}", b'{"abort_all":false}', b'{"req_ids":[]}', b'{"abort_all":1}'])
def test_neither_is_refused_in_fastdeploys_words(body: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        wanted(body)
    assert refused.value.message == NEITHER == "must provide abort_all=true or req_ids"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"null", b'{"req_ids":"a"}', b'{"req_ids":[1]}', b'{"req_ids":["\xff"]}', b"[" * 100_000],
)
def test_anything_else_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        wanted(body)


def test_ids_are_bounded() -> None:
    body = b'{"req_ids":[' + b",".join(b'"%d"' % n for n in range(MOST_IDS + 1)) + b"]}"
    with pytest.raises(BadRequest):
        wanted(body)


@pytest.mark.parametrize("asked", ["r-1", "chatcmpl-r-1", "cmpl-r-1", "cmpl-r-1-0"])
def test_a_request_is_found_by_its_own_id_and_by_that_of_its_answer(asked: str) -> None:
    assert by_name([asked])["r-1"] == asked


@pytest.mark.parametrize("asked", ["r", "r-2", "r-1-0", "chatcmpl-r-1-0", "R-1"])
def test_a_request_is_not_found_by_what_only_looks_alike(asked: str) -> None:
    assert "r-1" not in by_name([asked])


def result(asked: list[str] | None, ended: list[Aborted], engines: list[Aborted]) -> tuple[dict[str, int], list[str]]:
    found: Any = merged(asked, ended, engines, [])
    assert found["request_id"].startswith("control-")
    assert (found["status"], found["error_message"], found["errors"]) == ("success", "Success", [])
    aborted = {entry.request_id: entry.output_token_count for entry in found["result"]["aborted"]}
    assert len(aborted) == len(found["result"]["aborted"])
    return aborted, found["result"]["not_found"]


def test_whatever_anybody_aborted_is_listed_once() -> None:
    asked = ["a", "chatcmpl-b", "c", "d"]
    engines = [Aborted("chatcmpl-a_0", 7), Aborted("b", 3), Aborted("b", 0)]
    assert result(asked, [Aborted("a", 5), Aborted("c", 2)], engines) == ({"a": 7, "c": 2, "chatcmpl-b": 3}, ["d"])


def test_all_has_nothing_that_is_not_found() -> None:
    assert result(None, [Aborted("a", 1)], [Aborted("x", 2)]) == ({"a": 1, "x": 2}, [])


def test_who_could_not_be_asked_is_named() -> None:
    failures = [Failure("http://a:1", "no answer")]
    assert merged(["a"], [], [], failures)["errors"] == failures


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"result":{"aborted":[{"request_id":"a","output_token_count":4}],"not_found":["b"]}}', [Aborted("a", 4)]),
        (b'{"result":null}', []),
        (b"", []),
        (b"[]", []),
        (b'{"result":{"aborted":[1]}}', []),
    ],
)
def test_an_engine_may_answer_nothing(body: bytes, found: list[Aborted]) -> None:
    assert read_result(body) == found
