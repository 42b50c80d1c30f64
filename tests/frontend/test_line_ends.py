"""Lines of a stream, however it is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import UpstreamBroken
from frontend.line_ends import LineEnds
from frontend.upstream.base import AnswerHead
from tests.support.sinks import RecordingSink


class Client(RecordingSink):
    """Takes what comes within a call of the test's own."""

    def answer(self, head: AnswerHead, data: bytes) -> None:
        raise AssertionError("an answer as a whole has lines, too")

    def chunk(self, framed: bytes, size: int) -> None:
        raise AssertionError("a chunk has lines, too")


def relayed(*pieces: bytes) -> bytes:
    client = Client()
    sink = LineEnds(client)
    sink.start(200, [(b"content-length", b"7"), (b"x-own", b"1")])
    for piece in pieces:
        sink.write(piece)
    sink.finish()
    assert client.headers == [(b"x-own", b"1")]
    assert all(client.pieces)
    return client.body


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        ([], b""),
        ([b"data: 1\n\n"], b"data: 1\n\n"),
        ([b"data: 1\r\n\r\n"], b"data: 1\n\n"),
        ([b"data: 1\r", b"\n\r", b"\n"], b"data: 1\n\n"),
        ([b"no end"], b"no end\n"),
        ([b"no end\r"], b"no end\n"),
        ([b"a\rb\n"], b"a\rb\n"),
        ([b"a\r", b"b\n"], b"a\rb\n"),
        ([b"\r"], b""),
        ([b"\n\n\n"], b"\n\n\n"),
    ],
)
def test_each_line_ends_with_one_newline(pieces: list[bytes], lines: bytes) -> None:
    assert relayed(*pieces) == lines


@given(st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"x", b"data: y"])), st.data())
def test_it_does_not_matter_where_a_stream_is_cut(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    places = sorted(data.draw(st.sets(st.integers(1, max(len(whole) - 1, 1)))))
    cuts = [0, *[place for place in places if place < len(whole)], len(whole)]
    pieces = [whole[a:b] for a, b in itertools.pairwise(cuts) if b > a]
    assert relayed(*pieces) == (relayed(whole) if whole else b"")


def test_what_comes_whole_or_framed_has_lines_too() -> None:
    client = Client()
    LineEnds(client).answer(AnswerHead([(b"content-length", b"9")]), b"{}\r\n{}")
    assert (client.body, client.headers, client.ended.is_set()) == (b"{}\n{}\n", [], True)
    client = Client()
    sink = LineEnds(client)
    sink.start(200, [])
    sink.chunk(b"3\r\na\r\n\r\n", 3)
    sink.finish()
    assert client.body == b"a\n"


def test_a_failure_passes() -> None:
    client = Client()
    sink = LineEnds(client)
    sink.start(200, [])
    sink.write(b"data: 1\r\n\r")
    error = UpstreamBroken("gone")
    sink.fail(error)
    assert (client.error, client.body) == (error, b"data: 1\n")
