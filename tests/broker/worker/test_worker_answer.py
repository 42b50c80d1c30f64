"""OpenAI's forms, and the prompt's text in a request."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.worker import Answer, EngineError, Finish, Request

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def answer(path: str, *, stream: bool, **body: object) -> Answer:
    return Answer(path, body, stream=stream, id="1", created=5)


@given(st.lists(st.text()), st.sampled_from([CHAT, TEXT]))
def test_the_events_of_a_stream_put_together_are_the_text(deltas: list[str], path: str) -> None:
    made = answer(path, stream=True)
    raw = b"".join([*(made.text(d) for d in deltas), made.end(Finish())])
    *events, end = raw.decode().removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    choices = [json.loads(e.removeprefix("data: "))["choices"][0] for e in events]
    pieces = [c["delta"].get("content", "") if path == CHAT else c["text"] for c in choices]
    assert "".join(pieces) == "".join(deltas)
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]


def test_an_empty_chat_stream_still_says_who_speaks() -> None:
    assert b'"role":"assistant"' in answer(CHAT, stream=True).end(Finish())


def test_an_unstreamed_answer_says_nothing_before_its_end() -> None:
    made = answer(TEXT, stream=False, model="m")
    assert made.text("a") == b""
    assert json.loads(made.end(Finish()))["choices"][0]["text"] == "a"


def test_usage_is_streamed_only_when_asked_for() -> None:
    assert b"usage" not in answer(TEXT, stream=True).end(Finish(prompt_tokens=1))
    made = answer(TEXT, stream=True, stream_options={"include_usage": True})
    assert b'"prompt_tokens":1' in made.end(Finish(prompt_tokens=1))


@pytest.mark.parametrize(
    ("body", "prompt"),
    [
        ({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}, "a\nb"),
        ({"messages": [{"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}, "a\n"),
        ({"messages": ["odd", {"content": None}]}, ""),
        ({"prompt": "a"}, "a"),
        ({"prompt": ["a", "b"]}, "a\nb"),
        ({"prompt": [1, 2]}, ""),
        ({}, ""),
    ],
)
def test_the_prompt_is_the_text_that_is_there(body: object, prompt: str) -> None:
    request = Request("1", TEXT, json.dumps(body).encode(), stream=False, headers={})
    assert request.prompt == prompt


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"1", b"[" * 100_000, b'"\xff"'])
def test_a_body_that_is_no_object_is_a_400(raw: bytes) -> None:
    with pytest.raises(EngineError) as error:
        _ = Request("1", TEXT, raw, stream=False, headers={}).body
    assert error.value.status == 400


def test_errors_have_openais_form() -> None:
    assert json.loads(EngineError(429, "full", "overloaded_error").body()) == {
        "error": {"message": "full", "type": "overloaded_error", "param": None, "code": 429}
    }
