"""What is understood of a body: session, text, tokens."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BadRequest
from broker.faces import FD_ROUTER, PENSTOCK
from frontend import body
from frontend.members import Body


def read(tree: Any) -> Body:
    return body.parse(json.dumps(tree).encode())


@pytest.mark.parametrize(
    ("tree", "text", "tokens"),
    [
        ({}, "", 0),
        ({"messages": [{"role": "user", "content": "12345"}]}, "12345", 2),
        ({"messages": [{"content": "ab"}, {"content": "cd"}]}, "ab\ncd", 1),
        ({"messages": [{"content": [{"type": "text", "text": "abcd"}, {"type": "image_url"}]}]}, "abcd", 1),
        ({"messages": [{"content": None, "tool_calls": []}]}, "", 0),
        ({"prompt": "é"}, "é", 1),
        ({"prompt": "éééé€"}, "éééé€", 3),
        ({"prompt": ["ab", "cd"]}, "ab\ncd", 1),
        ({"prompt": [1, 2, 3]}, "", 3),
        ({"prompt": [[1, 2], [3, 4, 5]]}, "", 5),
        ({"prompt": []}, "", 0),
        ({"input": "abcd"}, "abcd", 1),
        ({"input": [7] * 9}, "", 9),
    ],
)  # fmt: skip
def test_text_is_estimated_and_token_ids_are_counted(tree: Any, text: str, tokens: int) -> None:
    assert read(tree).text() == (text, tokens)


def test_tools_are_text_as_the_client_wrote_them() -> None:
    tools = '[{"type":  "function", "function": {"name": "wetter", "description": "Wie wärmer?"}}]'
    data = b'{"tools": ' + tools.encode() + b', "prompt": "x"}'
    assert body.parse(data).tools_text() == tools
    assert body.parse_freely(data).tools_text() == ""
    assert body.parse(b'{"tools": null}').tools_text() == body.parse(b'{"tools": []}').tools_text() == ""
    assert body.parse(b"{}").tools_text() == ""


def test_tools_of_a_body_that_is_read_slowly_are_text_too() -> None:
    read = body.parse(b'{"tools": [{"a": 1}], "prompt": "a\\ud83d"}')
    assert read.tools_text() == '[{"a": 1}]'


@pytest.mark.parametrize(
    ("tree", "ids"),
    [
        ({}, []),
        ({"prompt": [1, 2, 3]}, [1, 2, 3]),
        ({"prompt": [[1, 2], [3]]}, [1, 2, 3]),
        ({"input": [7, 8]}, [7, 8]),
        ({"prompt": [1, "a"]}, []),
        ({"prompt": [1.5]}, []),
        ({"prompt": [2**70]}, []),
        ({"prompt": [[1], None]}, []),
        ({"prompt": "text"}, []),
    ],
)
def test_token_ids_are_kept_if_that_is_what_they_are(tree: Any, ids: list[int]) -> None:
    assert list(read(tree).token_ids()) == ids


@pytest.mark.parametrize(
    ("tree", "text", "tokens"),
    [
        ({"messages": [{"content": " a "}, {"content": "b"}]}, "a b", 6),
        ({"messages": [{"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}, "a b", 6),
        ({"messages": [{"content": [{"type": "image_url", "text": "a"}, {"text": "b"}, "c", None]}]}, "", 0),
        ({"messages": [{"content": [{"type": "text", "text": 5}]}, {"text": "a"}, "b", {"content": None}]}, "", 0),
        ({"messages": {"content": "a"}}, "", 0),
        ({"messages": [{"content": ""}, {"content": " \n"}, {"content": "漢"}], "tools": ["x"]}, "漢", 2),
        ({"prompt": "a"}, "a", 2),
        ({"prompt": ["a", 5, " b ", ["c"], {"content": "d"}]}, "a b", 6),
        ({"prompt": [1, 2, 3]}, "", 24),
        ({"prompt": [[1, 2], [3]]}, "", 24),
        ({"prompt": {"content": "a"}, "input": "b"}, "", 0),
    ],
)
def test_text_is_what_fastdeploys_router_takes_for_it(tree: Any, text: str, tokens: int) -> None:
    assert body.parse_freely(json.dumps(tree).encode()).text(FD_ROUTER.estimate) == (text, tokens)


def test_what_is_no_utf_8_is_the_engines_business_where_the_original_left_it_to_them() -> None:
    read = body.parse_freely(b'{"prompt": "a\xff", "stream": true}')
    assert (read.text()[0], read.stream) == ("a\ufffd", True)


def test_a_cut_emoji_does_not_stop_a_request() -> None:
    read = body.parse(b'{"model": "m", "prompt": "a\\ud83d"}')
    assert read.model == "m"
    assert read.text() == ("a\ud83d", 1)


@pytest.mark.parametrize(("value", "session"), [("s", "s"), (5, "5"), ("", None), (None, None), ([], None), ({}, None)])
def test_a_session_is_a_text_or_a_number(value: Any, session: str | None) -> None:
    assert read({"session_id": value}).session() == session


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(("messages", "prompt", "input", "session_id", "content", "tools")), json_values))
def test_any_shape_of_the_rest_is_tolerated(tree: dict[str, Any]) -> None:
    text, tokens = read(tree).text()
    assert isinstance(text, str)
    assert tokens >= 0
    assert isinstance(read(tree).tools_text(), str)
    assert all(isinstance(token, int) for token in read(tree).token_ids())


messages = st.fixed_dictionaries({}, optional={"content": json_values, "text": json_values})
chats = st.fixed_dictionaries(
    {"messages": st.none() | st.lists(messages, max_size=3)},
    optional={
        "model": st.none() | st.text(),
        "stream": st.none() | st.booleans(),
        **dict.fromkeys(("prompt", "input", "session_id", "tools"), json_values),
    },
)


@given(chats | st.dictionaries(st.sampled_from(("messages", "prompt", "session_id", "tools")), json_values))
def test_the_gist_of_a_body_is_what_it_says_of_itself(tree: dict[str, Any]) -> None:
    read = body.parse(json.dumps(tree).encode())
    said = read.model, bool(read.stream), read.session(), read.tools_text(), *read.text()
    assert body.gist(read, PENSTOCK.estimate) == said


@given(st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()))
def test_whatever_comes_is_read_or_refused(data: bytes) -> None:
    try:
        read = body.parse(data)
    except BadRequest:
        return
    assert isinstance(json.loads(data), dict)
    assert read.model is None or isinstance(read.model, str)
    assert read.stream is None or isinstance(read.stream, bool)


@pytest.mark.parametrize("depth", [9, 480, 900])
@pytest.mark.parametrize("shape", ['{"messages": [{"content": %s}]}', '{"prompt": %s}', '{"input": %s}'])
def test_text_is_not_looked_for_deeper_than_any_known_shape(shape: str, depth: int) -> None:
    data = (shape % ("[" * depth + '"x"' + "]" * depth)).encode()
    for parsed in (body.parse(data), body.parse_freely(data)):
        assert parsed.text()[0] == ""


def test_deep_nesting_is_refused_not_a_crash() -> None:
    for opening in (b'{"a":', b'{"messages":['):
        with pytest.raises(BadRequest):
            body.parse(opening * 200_000)


@pytest.mark.parametrize("parse", [body.parse, body.parse_freely])
def test_half_a_surrogate_in_a_name_is_shown_as_a_question_mark(parse: Callable[[bytes], body.Body]) -> None:
    read = parse(b'{"model": "a\\ud83d", "session_id": "\\ud83d", "req_id": "\\ud83d", "prompt": "b"}')
    assert (read.model, read.session()) == ("a?", "?")
    assert all(value == "?" for _, value in read.tags())
    nested = body.parse_freely(b'{"extra_body": {"session_id": "\\ud83d"}, "prompt": "b"}')
    assert nested.session() == "?"


def crowd(unit: str, before: str = "", after: str = "") -> bytes:
    return f"{{{before}{','.join([unit] * 700_000)}{after}}}".encode()


@pytest.mark.parametrize("member", ["messages", "prompt", "input", "session_id", "model", "x"])
def test_a_body_of_very_many_values_is_skimmed(member: str) -> None:
    """Taken apart it would stop every stream of its frontend, and take thirty times its size."""
    data = crowd("{}", f'"stream": true, "model": "m", "{member}": [', "]")
    assert body.is_crowded(data)
    for parse in (body.parse, body.parse_freely):
        if member == "model":
            with pytest.raises(BadRequest, match="model"):
                parse(data)
            continue
        tracemalloc.start()
        try:
            parsed = parse(data)
            assert tracemalloc.get_traced_memory()[1] < len(data)
        finally:
            tracemalloc.stop()
        assert (parsed.model, parsed.stream, parsed.session(), parsed.token_ids()) == ("m", True, None, ())
        assert (parsed.text()[1] > 100_000) is (member in ("messages", "prompt", "input"))


def test_what_is_wrong_with_a_crowded_body_is_said() -> None:
    for data, said in (
        (crowd("{}", '"stream": 1, "x": [', "]"), "'stream' must be a boolean"),
        (crowd("{}", '"model": 1, "x": [', "]"), "'model' must be a string"),
        (crowd("{}", '"x": [', "]]"), "not valid JSON"),
        (crowd("{}", '"x": [', "]")[5:-1], "not valid JSON"),
    ):
        with pytest.raises(BadRequest, match=said):
            body.parse(data)
    assert body.parse_freely(crowd("{}", '"stream": 1, "model": 1, "x": [', "]")).model is None


def test_a_long_text_is_not_crowded() -> None:
    assert not body.is_crowded(json.dumps({"prompt": "word, " * 500_000}).encode())
    assert not body.is_crowded(json.dumps({"prompt": [1] * 1_000_000}).encode())
