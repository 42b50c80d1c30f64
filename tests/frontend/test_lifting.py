"""Bodies whose long texts are taken past the parser are read as if they were not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend import body, lifting

if lifting.lift is None:
    pytest.skip("it was not compiled here", allow_module_level=True)
lift = lifting.lift
L = lifting.LONG


def plain(data: bytes) -> Any:
    """Past nothing: what the decoder makes of it, or that it refuses."""
    try:
        return body._chat_decoder.decode(data)
    except ValueError as error:
        return str(error)


def lifted(data: bytes) -> Any:
    try:
        return lifting.decode_chat(body._chat_decoder, data)
    except ValueError as error:
        return str(error)


LONG_TEXT = "Of some length. " * (L // 16)


def chat(*contents: object, **members: object) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps({"model": "m", "messages": messages, **members}, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "data",
    [
        chat(LONG_TEXT),
        chat("short", LONG_TEXT, "short", LONG_TEXT * 2),
        chat(LONG_TEXT + '\n\t"\\/\b\f\r'),
        chat("\n" + LONG_TEXT + "\n\n" + LONG_TEXT),
        chat("é" + LONG_TEXT + "你好 😀"),
        json.dumps({"prompt": LONG_TEXT, "stream": True}).encode(),
    ],
)
def test_long_contents_and_prompts_are_lifted(data: bytes) -> None:
    found = lift(data, L)
    assert found is not None
    assert len(found[0]) < 300
    assert lifted(data) == plain(data)


@pytest.mark.parametrize(
    "data",
    [
        chat("short"),
        chat(LONG_TEXT[:-1]),
        json.dumps({"prompt": LONG_TEXT + "\u4f60"}).encode(),  # a number behind a backslash
        chat("\0", LONG_TEXT),  # which looks like a mark
        chat("\n" * L),  # so many escapes that the parser is as fast
        chat(*["x"] * 100, LONG_TEXT),
        chat(LONG_TEXT)[:-20],
        chat(LONG_TEXT).replace(b"some", b"so\ne"),
        chat(LONG_TEXT).replace(b"some", b"so\\xe"),
        chat(LONG_TEXT).replace(b"some", b"so\xffe"),
        b'"' + b"x" * L + b"\\",
        b"",
    ],
)  # fmt: skip
def test_what_is_not_beyond_doubt_or_not_worth_it_is_left_to_the_parser(data: bytes) -> None:
    assert lift(data, L) is None
    assert lifted(data) == plain(data)


@pytest.mark.parametrize(
    "data",
    [
        chat(LONG_TEXT, tools=[{"description": LONG_TEXT}]),
        chat([{"type": "text", "text": LONG_TEXT}]),
        chat("x", prompt=[LONG_TEXT]),
        chat("x", model=LONG_TEXT),
        chat("x", session_id=LONG_TEXT),
        chat("x", **{LONG_TEXT: 1}),
        chat(LONG_TEXT)[:-1],
        chat(LONG_TEXT, stream=1),
        b'{"prompt": "%b", "prompt": "x"}' % LONG_TEXT.encode(),
        b'"%b"' % LONG_TEXT.encode(),
    ],
)
def test_what_stands_anywhere_else_is_read_as_ever(data: bytes) -> None:
    assert lift(data, L) is not None
    assert lifted(data) == plain(data)


pieces = st.sampled_from(
    [
        b'"',
        b"\\",
        b"\\n",
        b'\\"',
        b"\\\\",
        b"\\u0000",
        b"\\u00",
        b"\n",
        b"\xff",
        b"\xc3\xa9",
        b"{",
        b'"x":',
        b"word " * 30,
    ]
)


@settings(max_examples=400)
@given(parts=st.lists(pieces, max_size=12), at=st.integers(0, 60))
def test_whatever_stands_in_a_body_is_read_as_ever(parts: list[bytes], at: int) -> None:
    """Runs of any length around the strides, and any bytes within the strings and without."""
    data = b'{"messages": [{"content": "%b%b%b%b"}], "prompt": "%b"}' % (
        b"a" * at, b"".join(parts), b"b" * (300 - at), b"".join(parts[::-1]), b"c" * 64,
    )  # fmt: skip
    found = lift(data, 40)
    read = plain(data)
    if found is not None:
        chat = lifting._put_back(body._chat_decoder, *found)
        assert chat is None or chat == read
    assert lifted(data) == read


def test_it_takes_bytes_alone() -> None:
    for wrong in ((b"x",), ("x", 1), (b"x", "1")):
        with pytest.raises(TypeError):
            lift(*wrong)  # type: ignore[arg-type]  # on purpose
