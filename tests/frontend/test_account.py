"""The line of a request that has ended."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.account import _completion_tokens, _number, _where


@pytest.mark.parametrize(
    ("chunks", "tokens"),
    [
        ((b'{"usage":{"completion_tokens":64}}',), "64"),
        ((b'{"usage":{"completion_tokens" :\n 64, "x":1}}',), "64"),
        ((b'{"completion_tokens":1},{"completion_tokens":2}',), "2"),
        ((b"data: [DONE]\n\n", b'data: {"usage":{"completion_tokens":7}}\n\n'), "7"),
        ((b'{"completion_tokens":null}', b'{"completion_tokens":9}'), "9"),
        ((b'{"completion_tokens":64}' + b" " * 3000,), "-"),
        ((b'{"completion_tokens"',), "-"),
        ((b"", b""), "-"),
    ],
)
def test_tokens_are_those_that_the_engine_said_last(chunks: tuple[bytes, ...], tokens: str) -> None:
    assert _completion_tokens(chunks) == tokens


@given(st.text(" \t\r\n:0129a", max_size=20))
def test_a_number_is_read_as_a_regular_expression_would(text: str) -> None:
    data = text.encode()
    found = re.match(rb"[ \t\r\n]*:[ \t\r\n]*(\d{1,12})", data)
    assert _number(data) == (str(int(found[1])) if found else "")


def test_what_clients_say_cannot_forge_a_line_and_queries_are_left_out() -> None:
    for _ in range(2):
        where = _where("/v1/x?key=secret", "a b\nid=x", "http://a:1", "random")
        assert where == "path=/v1/x model=a?b?id=x instance=http://a:1 policy=random"
    assert _where("/v1/x", None, "-", "random") == "path=/v1/x model=- instance=- policy=random"
