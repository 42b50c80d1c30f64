"""Responses as bytes: what is read from them, and whether the connection may carry another request.

Every row is fed whole, byte by byte, and split in two at each place, and must mean the same each time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from frontend.upstream.http_response import MAX_HEAD_BYTES, ResponseReader


@dataclass(frozen=True)
class Row:
    name: str
    raw: bytes
    status: int = 200
    body: bytes = b""
    reusable: bool = False
    whole: bool = True
    """The response ended; else it is an error."""
    closes: bool = False
    """The engine closes its side behind these bytes."""
    head_only: bool = False


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
TWO = OK + b"Content-Length: 2\r\n\r\nhi"

ROWS = [
    # -- bodies with a length
    Row("length", TWO, body=b"hi", reusable=True),
    Row("no body", OK + b"Content-Length: 0\r\n\r\n", reusable=True),
    Row("no reason", b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", body=b"hi", reusable=True),
    Row("an error's body", b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nhi", status=500, body=b"hi", reusable=True),
    Row("a redirect is passed on", b"HTTP/1.1 302 F\r\nContent-Length: 0\r\n\r\n", status=302, reusable=True),
    Row("empty lines before", b"\r\n\r\n" + TWO, body=b"hi", reusable=True),
    Row("length with blanks", OK + b"Content-Length:  2 \r\n\r\nhi", body=b"hi", reusable=True),
    Row("cut short", OK + b"Content-Length: 3\r\n\r\nhi", body=b"hi", whole=False, closes=True),
    Row("nothing of the body", OK + b"Content-Length: 3\r\n\r\n", whole=False, closes=True),
    Row("binary", OK + b"Content-Length: 4\r\n\r\n\x00\r\n\xff", body=b"\x00\r\n\xff", reusable=True),
    # -- chunks
    Row("chunks", CHUNKED + b"2\r\nhi\r\n3\r\n yo\r\n0\r\n\r\n", body=b"hi yo", reusable=True),
    Row("no chunks", CHUNKED + b"0\r\n\r\n", reusable=True),
    Row("hex sizes", CHUNKED + b"0A\r\n0123456789\r\n0\r\n\r\n", body=b"0123456789", reusable=True),
    Row("leading zeros", CHUNKED + b"0002\r\nhi\r\n000\r\n\r\n", body=b"hi", reusable=True),
    Row("extension", CHUNKED + b'2;a=1;b="c"\r\nhi\r\n0;z\r\n\r\n', body=b"hi", reusable=True),
    Row("trailers", CHUNKED + b"2\r\nhi\r\n0\r\nX-Sum: 1\r\nY: 2\r\n\r\n", body=b"hi", reusable=True),
    Row("coding in capitals", OK + b"transfer-encoding: Chunked\r\n\r\n0\r\n\r\n", reusable=True),
    Row("chunks cut short", CHUNKED + b"5\r\nhi", body=b"hi", whole=False, closes=True),
    Row("no last chunk", CHUNKED + b"2\r\nhi\r\n", body=b"hi", whole=False, closes=True),
    Row("last chunk without its end", CHUNKED + b"2\r\nhi\r\n0\r\n", body=b"hi", whole=False, closes=True),
    Row("size is no number", CHUNKED + b"2\r\nhi\r\nzz\r\n", body=b"hi", whole=False),
    Row("size is negative", CHUNKED + b"-2\r\nhi\r\n", whole=False),
    Row("size is too large", CHUNKED + b"fffffffffffffffff\r\nhi\r\n", whole=False),
    Row("size with 0x", CHUNKED + b"0x2\r\nhi\r\n", whole=False),
    Row("chunk longer than said", CHUNKED + b"2\r\nhiho\r\n", body=b"hi", whole=False),
    Row("chunk ends with a bare LF", CHUNKED + b"2\r\nhi\n0\r\n\r\n", body=b"hi", whole=False),
    # -- framing in doubt
    Row("length and chunks", OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", status=0, whole=False),
    Row("chunks and length", OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n", status=0, whole=False),
    Row("two lengths", OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi", status=0, whole=False),
    Row("the same length twice", OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n", status=0, whole=False),
    Row("list of lengths", OK + b"Content-Length: 2, 2\r\n\r\nhi", status=0, whole=False),
    Row("length with a sign", OK + b"Content-Length: +2\r\n\r\nhi", status=0, whole=False),
    Row("negative length", OK + b"Content-Length: -2\r\n\r\nhi", status=0, whole=False),
    Row("length is no number", OK + b"Content-Length: two\r\n\r\nhi", status=0, whole=False),
    Row("length too large", OK + b"Content-Length: 18446744073709551616\r\n\r\n", status=0, whole=False),
    Row("other coding", OK + b"Transfer-Encoding: gzip\r\n\r\nhi", status=0, whole=False),
    Row("two codings", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", status=0, whole=False),
    Row("chunked twice", OK + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n", status=0, whole=False),
    Row("blank before colon", OK + b"Content-Length : 2\r\n\r\nhi", status=0, whole=False),
    Row("folded header", OK + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n", status=0, whole=False),
    Row("bare LF", b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi", status=0, whole=False),
    Row("NUL in a header", OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n", status=0, whole=False),
    # -- until the connection closes
    Row("until close", OK + b"\r\nhi", body=b"hi", closes=True),
    Row("until close, empty", OK + b"\r\n", closes=True),
    Row("HTTP/1.0", b"HTTP/1.0 200 OK\r\n\r\nhi", body=b"hi", closes=True),
    Row("HTTP/1.0 with length", b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", body=b"hi"),
    Row(
        "HTTP/1.0 keeps alive",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
        body=b"hi",
        reusable=True,
    ),
    Row("close announced", OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", body=b"hi"),
    Row("close among others", OK + b"Connection: x, Close\r\nContent-Length: 2\r\n\r\nhi", body=b"hi"),
    Row("keep-alive said", OK + b"Connection: keep-alive\r\nContent-Length: 0\r\n\r\n", reusable=True),
    # -- no body whatever the headers say
    Row("204", b"HTTP/1.1 204 No\r\n\r\n", status=204, reusable=True),
    Row("304", b"HTTP/1.1 304 Same\r\n\r\n", status=304, reusable=True),
    Row("304 with length", b"HTTP/1.1 304 Same\r\nContent-Length: 5\r\n\r\n", status=304, reusable=True),
    Row("HEAD", OK + b"Content-Length: 5\r\n\r\n", head_only=True),
    Row("HEAD, empty", OK + b"Content-Length: 0\r\n\r\n", head_only=True, reusable=True),
    Row("HEAD, chunked", CHUNKED, head_only=True),
    Row("HEAD with a body", TWO, head_only=True),
    Row("204 with a body", b"HTTP/1.1 204 No\r\n\r\nhi", status=204),
    # -- informational
    Row("100", b"HTTP/1.1 100 Continue\r\n\r\n" + TWO, body=b"hi", reusable=True),
    Row("103 and 100", b"HTTP/1.1 103 E\r\nLink: a\r\n\r\nHTTP/1.1 100 C\r\n\r\n" + TWO, body=b"hi", reusable=True),
    Row("100 and no more", b"HTTP/1.1 100 Continue\r\n\r\n", status=0, whole=False, closes=True),
    Row("100 with a length", b"HTTP/1.1 100 C\r\nContent-Length: 2\r\n\r\nhi" + TWO, status=0, whole=False),
    Row("101", b"HTTP/1.1 101 S\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nraw", status=0, whole=False),
    Row("101 without upgrade", b"HTTP/1.1 101 S\r\n\r\n", status=0, whole=False),
    # -- more than one response
    Row("two responses", TWO + TWO, body=b"hi"),
    Row("garbage behind", TWO + b"garbage", body=b"hi"),
    Row("one byte behind", TWO + b"H", body=b"hi"),
    Row("garbage behind chunks", CHUNKED + b"0\r\n\r\n0\r\n\r\n"),
    Row("garbage behind close", OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhixx", body=b"hi"),
    # -- no response
    Row("nothing", b"", status=0, whole=False, closes=True),
    Row("half a status line", b"HTTP/1.1 20", status=0, whole=False, closes=True),
    Row("half a head", OK + b"Content-Le", status=0, whole=False, closes=True),
    Row("not HTTP", b"220 mail ready\r\n", status=0, whole=False),
    Row("TLS", b"\x15\x03\x01\x00\x02\x02\x0a", status=0, whole=False),
    Row("status of two digits", b"HTTP/1.1 20 OK\r\n\r\n", status=0, whole=False),
    Row("status 099", b"HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n", status=0, whole=False),
    Row("status 600", b"HTTP/1.1 600 OK\r\nContent-Length: 0\r\n\r\n", status=0, whole=False),
    Row("status 1000", b"HTTP/1.1 1000 OK\r\nContent-Length: 0\r\n\r\n", status=0, whole=False),
    Row("version 3", b"HTTP/3.0 200 OK\r\nContent-Length: 0\r\n\r\n", status=0, whole=False),
    Row("head too long", OK + b"X: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n", status=0, whole=False),
    Row("head without end", OK + b"X: " + b"a" * (MAX_HEAD_BYTES + 1), status=0, whole=False),
    Row("too many headers", OK + b"X: a\r\n" * (MAX_HEAD_BYTES // 6), status=0, whole=False),
    Row("100 for ever", b"HTTP/1.1 100 C\r\n\r\n" * (MAX_HEAD_BYTES // 16), status=0, whole=False),
]


def read(row: Row, pieces: list[bytes]) -> tuple[int, bytes, bool, bool]:
    """Status, body, whole, reusable: as a connection reads, which stops at the end and looks at nothing behind."""
    reader = ResponseReader()
    reader.begin(head_only=row.head_only)
    body = b""
    rest = False
    for piece in pieces:
        if reader.complete or reader.error:
            rest = rest or bool(reader.complete)  # bytes for an idle connection: it is closed
            break
        reader.feed(piece)
        if reader.has_body:
            body += reader.take()
    if row.closes and not reader.complete and not reader.error:
        reader.end()
    assert reader.complete != (reader.error is not None), reader
    return reader.status, body, reader.complete, reader.reusable and not rest


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_response(row: Row) -> None:
    expected = (row.status, row.body, row.whole, row.reusable)
    assert read(row, [row.raw]) == expected
    assert read(row, [row.raw[i : i + 1] for i in range(len(row.raw))]) == expected
    if len(row.raw) < 1024:
        for at in range(1, len(row.raw)):
            assert read(row, [row.raw[:at], row.raw[at:]]) == expected, at


def test_headers_are_end_to_end_ones_in_order_with_small_names() -> None:
    reader = ResponseReader()
    reader.feed(
        OK + b"X-B: 1\r\nConnection: keep-alive, X-Hop\r\nKeep-Alive: timeout=5\r\nX-Hop: 2\r\nSet-Cookie: a\r\n"
        b"Set-Cookie: b \r\nContent-Length: 0\r\nTE: x\r\nUpgrade: y\r\nProxy-Connection: z\r\nTrailer: w\r\n\r\n"
    )
    assert reader.headers == [
        (b"x-b", b"1"),
        (b"set-cookie", b"a"),
        (b"set-cookie", b"b"),
        (b"content-length", b"0"),
    ]


def test_headers_of_informational_responses_are_not_passed_on() -> None:
    reader = ResponseReader()
    reader.feed(b"HTTP/1.1 103 E\r\nLink: a\r\nConnection: x-a\r\n\r\n" + OK + b"X-A: 1\r\nContent-Length: 0\r\n\r\n")
    assert reader.headers == [(b"x-a", b"1"), (b"content-length", b"0")]


def test_connection_cannot_name_the_framing() -> None:
    reader = ResponseReader()
    reader.feed(OK + b"Connection: content-length\r\nContent-Length: 2\r\n\r\nhi")
    assert reader.headers == [(b"content-length", b"2")]
    assert reader.complete


def test_body_of_one_read_is_one_piece() -> None:
    reader = ResponseReader()
    reader.feed(CHUNKED + b"1\r\na\r\n" * 100)
    assert reader.take() == b"a" * 100
    assert not reader.has_body


@pytest.mark.parametrize("start", [b"0\r\nX: ", b"2;", b"0\r\n\r"], ids=["trailer", "extension", "last line"])
def test_a_chunk_line_or_trailer_without_end_is_bounded(start: bytes) -> None:
    reader = ResponseReader()
    reader.feed(CHUNKED + start)
    fed = 0
    while reader.error is None:
        assert fed <= MAX_HEAD_BYTES
        reader.feed(b"a" * 1024)
        fed += 1024
    assert reader.status == 200


def test_reader_reads_one_response_after_another() -> None:
    reader = ResponseReader()
    for raw, body in [(TWO, b"hi"), (CHUNKED + b"1\r\na\r\n0\r\nT: 1\r\n\r\n", b"a"), (TWO, b"hi")] * 3:
        reader.begin()
        reader.feed(raw)
        assert (reader.complete, reader.reusable, reader.take()) == (True, True, body)


@pytest.mark.parametrize("inputs", [5000, pytest.param(1_000_000, marks=pytest.mark.stress)])
def test_mutated_responses_never_raise_and_always_end(inputs: int) -> None:
    """Whatever the bytes, after the engine has closed the answer is either whole or an error."""
    draw = random.Random(20260101)
    valid = [row.raw for row in ROWS if 0 < len(row.raw) < 1024]
    for _ in range(inputs):
        raw = bytearray(draw.choice(valid))
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(raw) + 1)
            match draw.randrange(4):
                case 0:
                    raw[at : at + 1] = bytes([draw.randrange(256)])
                case 1:
                    del raw[at : at + draw.randint(1, 8)]
                case 2:
                    raw[at:at] = draw.choice(
                        [b"\r\n", b"\n", b"0\r\n\r\n", b"\0", b" ", b"Content-Length: 1\r\n", b"\xff"]
                    )
                case _:
                    raw[at:at] = draw.choice(valid)
        cut = draw.randrange(len(raw) + 1)
        read(Row("mutated", bytes(raw), closes=True), [bytes(raw[:cut]), bytes(raw[cut:])])


def test_a_204_is_passed_on_without_the_length_that_it_may_not_have() -> None:
    for status, names in ((204, [b"x"]), (304, [b"x", b"content-length"])):
        reader = ResponseReader()
        reader.feed(b"HTTP/1.1 %d S\r\nX: y\r\nContent-Length: 5\r\n\r\n" % status)
        assert reader.complete
        assert [name for name, _ in reader.headers] == names
