"""The server's half of HTTP/1.1 as a table: bytes in, bytes out, and what becomes of the connection.

Every row holds on both paths, whether its heads are known or not, and however its bytes are cut into reads. The engine
answers each request that reaches it with the body `{}`; `forwarded` are the bodies that did. In `out`, an error of ours
stands as its status and code.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

State = Literal["open", "closed"]

HOST = b"host: x\r\n"
ID = b"x-request-id: i\r\n"
JSON = b"content-length: 2\r\n\r\n{}"
LINE = b"POST /v1/completions HTTP/1.1\r\n"
HEAD = LINE + HOST + ID
GOOD = HEAD + JSON
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
LIVE = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-request-id: i\r\n\r\n{}"
OK_LAST = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-request-id: i\r\nconnection: close\r\n\r\n{}"
ALIVE = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nlive"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LIMIT = 4096
"""Of a body, in the frontend that the table is for."""
BAD = b"<400 malformed_request, closing>"
LONG = b"<431 head_too_large, closing>"
REFUSED = b"<400 ->"
LARGE = b"<413 body_too_large>"
LARGE_LAST = b"<413 body_too_large, closing>"
NO_METHOD = b"<405 ->"


class Row(NamedTuple):
    name: str
    sent: bytes
    out: bytes
    state: State = "open"
    forwarded: tuple[bytes, ...] = ()

    @property
    def nameless(self) -> Row:
        """The same where requests have no ids of their own, so that their heads can come again."""
        sent = re.sub(rb"(?i)\r\nx-request-id: i\r\n", b"\r\n", self.sent)
        return self._replace(sent=sent, out=self.out.replace(ID, b"x-request-id: made\r\n"))


def good(name: str, sent: bytes, *forwarded: bytes) -> Row:
    return Row(name, sent, OK * len(forwarded), "open", forwarded)


def bad(name: str, sent: bytes, said: bytes = BAD) -> Row:
    return Row(name, sent, said, "closed")


ROWS = [
    # -- one request --------------------------------------------------------------------------------------------
    good("length", GOOD, b"{}"),
    good("names in any case", LINE + b"HOST: x\r\nX-REQUEST-ID: i\r\nCONTENT-LENGTH: 2\r\n\r\n{}", b"{}"),
    good("white space around a value", HEAD + b"content-length: \t 2 \t\r\n\r\n{}", b"{}"),
    good("leading zeros of a length", HEAD + b"content-length: 0002\r\n\r\n{}", b"{}"),
    good("empty lines before a request", b"\r\n\r\n" + GOOD, b"{}"),
    good("bytes above ASCII in a value", HEAD + b"x-a: \xff\r\n" + JSON, b"{}"),
    good("an empty host", LINE + b"host:\r\n" + ID + JSON, b"{}"),
    good("chunks", CHUNKED + b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n", b"{}"),
    good("chunk sizes in hexadecimal", CHUNKED + b"A\r\n{\"n\":1234}\r\n0\r\n\r\n", b'{"n":1234}'),
    good("leading zeros of a chunk size", CHUNKED + b"0002\r\n{}\r\n000\r\n\r\n", b"{}"),
    good("chunk extensions", CHUNKED + b"2;a=b;c=\"d\"\r\n{}\r\n0;e\r\n\r\n", b"{}"),
    good("trailers are dropped", CHUNKED + b"2\r\n{}\r\n0\r\nx-request-id: other\r\nx-t: 1\r\n\r\n", b"{}"),
    good("the word chunked in any case", HEAD + b"transfer-encoding: Chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", b"{}"),
    good("an upgrade is declined", HEAD + b"connection: upgrade\r\nupgrade: h2c\r\n" + JSON, b"{}"),
    good("an upgrade with a settings header", HEAD + b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
         b"http2-settings: AAMAAABkAAQAAP__\r\n" + JSON, b"{}"),
    good("Connection: keep-alive", HEAD + b"connection: keep-alive\r\n" + JSON, b"{}"),
    Row("Connection: close", HEAD + b"connection: close\r\n" + JSON, OK_LAST, "closed", (b"{}",)),
    Row("close among other words", HEAD + b"connection: x, Close\r\n" + JSON, OK_LAST, "closed", (b"{}",)),
    Row("HTTP/1.0", b"POST /v1/completions HTTP/1.0\r\n" + ID + JSON, OK_LAST, "closed", (b"{}",)),
    Row("HTTP/1.0 is not kept alive", b"POST /v1/completions HTTP/1.0\r\nconnection: keep-alive\r\n" + ID + JSON,
        OK_LAST, "closed", (b"{}",)),
    Row("a request that is not whole", HEAD + b"content-length: 3\r\n\r\n{}", b"", "open"),
    Row("a head that is not whole", HEAD, b"", "open"),
    Row("a chunk that is not whole", CHUNKED + b"5\r\n{}", b"", "open"),
    # -- Expect ---------------------------------------------------------------------------------------------------
    Row("Expect, body not yet sent", HEAD + b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n", CONTINUE, "open"),
    Row("Expect, body sent all the same", HEAD + b"expect: 100-continue\r\n" + JSON, CONTINUE + OK, "open", (b"{}",)),
    Row("Expect of HTTP/1.0 is not heard", b"POST /v1/completions HTTP/1.0\r\nexpect: 100-continue\r\n" + ID + JSON,
        OK_LAST, "closed", (b"{}",)),
    Row("Expect of too much", HEAD + b"expect: 100-continue\r\ncontent-length: 4097\r\n\r\n", LARGE_LAST, "closed"),
    # -- several on one connection ---------------------------------------------------------------------------------
    good("two in one go", GOOD + GOOD.replace(b"{}", b"[]").replace(b"[]", b"{}"), b"{}", b"{}"),
    good("after chunks", CHUNKED + b"2\r\n{}\r\n0\r\n\r\n" + GOOD, b"{}", b"{}"),
    good("after a declined upgrade", HEAD + b"connection: upgrade\r\nupgrade: h2c\r\n" + JSON + GOOD, b"{}", b"{}"),
    good("eight in one go", GOOD * 8, *[b"{}"] * 8),
    Row("both kinds in order", GOOD + LIVE + GOOD + LIVE, OK + ALIVE + OK + ALIVE, "open", (b"{}", b"{}")),
    Row("starlette's first", LIVE + GOOD, ALIVE + OK, "open", (b"{}",)),
    Row("nothing after close", HEAD + b"connection: close\r\n" + JSON + GOOD, OK_LAST, "closed", (b"{}",)),
    Row("a refused one between", GOOD + HEAD + b"content-length: 2\r\n\r\n[]" + GOOD, OK + REFUSED + OK, "open",
        (b"{}", b"{}")),
    Row("garbage behind a good one", GOOD + b"garbage\r\n\r\n", OK + BAD, "closed", (b"{}",)),
    Row("garbage behind two", GOOD + LIVE + b"\0\r\n\r\n", OK + ALIVE + BAD, "closed", (b"{}",)),
    Row("a broken body behind a good one", GOOD + CHUNKED + b"zz\r\n", OK + BAD, "closed", (b"{}",)),
    Row("more than a body", HEAD + b"content-length: 2\r\n\r\n{}{}", OK + BAD, "closed", (b"{}",)),
    # -- limits ---------------------------------------------------------------------------------------------------
    Row("a length beyond the limit", HEAD + b"content-length: 4097\r\n\r\n" + b"x" * 4097 + GOOD, LARGE + OK, "open",
        (b"{}",)),
    Row("chunks beyond the limit", CHUNKED + b"1001\r\n" + b"x" * 4097 + b"\r\n0\r\n\r\n" + GOOD, LARGE + OK, "open",
        (b"{}",)),
    bad("a target without end", b"POST /v1/" + b"x" * 70_000, LONG),
    bad("a header without end", HEAD + b"x-a: " + b"x" * 70_000, LONG),
    bad("headers without end", HEAD + b"x-a: 1234567890\r\n" * 5000, LONG),
    bad("trailers without end", CHUNKED + b"2\r\n{}\r\n0\r\n" + b"x-a: 1234567890\r\n" * 5000, LONG),
    bad("a chunk extension without end", CHUNKED + b"2;" + b"x" * 100_000, LONG),
    # -- methods and targets ----------------------------------------------------------------------------------------
    Row("GET of an inference route", b"GET /v1/completions HTTP/1.1\r\n" + HOST + b"\r\n", NO_METHOD),
    Row("HEAD of an inference route", b"HEAD /v1/completions HTTP/1.1\r\n" + HOST + b"\r\n",
        b"HTTP/1.1 405 Method Not Allowed\r\nallow: POST\r\ncontent-length: 18\r\n"
        b"content-type: text/plain; charset=utf-8\r\n\r\n"),
    Row("OPTIONS of an inference route", b"OPTIONS /v1/completions HTTP/1.1\r\n" + HOST + b"\r\n", NO_METHOD),
    good("an absolute target", b"POST http://y/v1/completions HTTP/1.1\r\n" + HOST + ID + JSON, b"{}"),
    good("an escaped path", b"POST /v1/%63ompletions HTTP/1.1\r\n" + HOST + ID + JSON, b"{}"),
    good("a query", b"POST /v1/completions?a=b%20c HTTP/1.1\r\n" + HOST + ID + JSON, b"{}"),
    bad("an absolute target without a path", b"POST http://y HTTP/1.1\r\n" + HOST + JSON),
    Row("a target that is only a star", b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", b"<404 ->"),
    bad("CONNECT", b"CONNECT a:1 HTTP/1.1\r\n" + HOST + b"\r\n"),
    bad("a method in lower case", b"post /v1/completions HTTP/1.1\r\n" + HOST + JSON),
    bad("an unknown method", b"SMUGGLE /v1/completions HTTP/1.1\r\n" + HOST + JSON),
    bad("a space in the target", b"POST /v1/a b HTTP/1.1\r\n" + HOST + JSON),
    bad("a control character in the target", b"POST /v1/\x01 HTTP/1.1\r\n" + HOST + JSON),
    bad("a byte above ASCII in the target", b"POST /v1/\xff HTTP/1.1\r\n" + HOST + JSON),
    # -- versions ---------------------------------------------------------------------------------------------------
    bad("HTTP/0.9", b"POST /v1/completions\r\n\r\n"),
    bad("HTTP/0.9 by name", b"POST /v1/completions HTTP/0.9\r\n" + HOST + JSON),
    bad("HTTP/1.2", b"POST /v1/completions HTTP/1.2\r\n" + HOST + JSON),
    bad("HTTP/2.0", b"POST /v1/completions HTTP/2.0\r\n" + HOST + JSON),
    bad("HTTP/2's preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    bad("a TLS greeting", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    # -- what could be read in two ways ------------------------------------------------------------------------------
    bad("length and chunks", HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    bad("chunks and length", HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n"),
    bad("two lengths", HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}"),
    bad("the same length twice", HEAD + b"content-length: 2\r\n" + JSON),
    bad("a list of lengths", HEAD + b"content-length: 2, 2\r\n\r\n{}"),
    bad("a signed length", HEAD + b"content-length: +2\r\n\r\n{}"),
    bad("a negative length", HEAD + b"content-length: -2\r\n\r\n{}"),
    bad("an empty length", HEAD + b"content-length: \r\n\r\n{}"),
    bad("a length in hexadecimal", HEAD + b"content-length: 0x2\r\n\r\n{}"),
    bad("a length with a space within", HEAD + b"content-length: 1 0\r\n\r\n{}"),
    bad("a length beyond 64 bits", HEAD + b"content-length: 18446744073709551618\r\n\r\n{}"),
    bad("another coding", HEAD + b"transfer-encoding: gzip\r\n\r\n{}"),
    bad("another coding before chunked", HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    bad("another coding after chunked", HEAD + b"transfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
    bad("chunked twice", HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    bad("identity", HEAD + b"transfer-encoding: identity\r\n\r\n"),
    bad("almost chunked", HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n"),
    bad("chunked after a control character", HEAD + b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    bad("chunks of HTTP/1.0", b"POST /v1/completions HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    bad("a space before the colon", HEAD + b"content-length : 2\r\n\r\n{}"),
    bad("a folded line", HEAD + b"x-a: b\r\n c\r\n" + JSON),
    bad("a folded coding", HEAD + b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n"),
    bad("a space before the first header", LINE + b" host: x\r\n" + JSON),
    bad("a header without a colon", HEAD + b"abc\r\n" + JSON),
    bad("a header without a name", HEAD + b": a\r\n" + JSON),
    bad("NUL in a value", HEAD + b"x-a: a\0b\r\n" + JSON),
    bad("a control character in a name", HEAD + b"x\x01: a\r\n" + JSON),
    bad("bare LF after the first line", b"POST /v1/completions HTTP/1.1\n" + HOST + JSON),
    bad("bare LF after a header", HEAD + b"x-a: b\n" + JSON),
    bad("bare LF at the end of the head", HEAD + b"content-length: 2\r\n\n{}"),
    bad("bare CR in a header", HEAD + b"x-a: b\rx-b: c\r\n" + JSON),
    bad("a signed chunk size", CHUNKED + b"+2\r\n{}\r\n0\r\n\r\n"),
    bad("a negative chunk size", CHUNKED + b"-1\r\n{}\r\n0\r\n\r\n"),
    bad("0x before a chunk size", CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n"),
    bad("a space after a chunk size", CHUNKED + b"2 \r\n{}\r\n0\r\n\r\n"),
    bad("no chunk size", CHUNKED + b"\r\n{}\r\n0\r\n\r\n"),
    bad("a chunk size beyond 64 bits", CHUNKED + b"10000000000000002\r\n{}\r\n0\r\n\r\n"),
    bad("bare LF after a chunk size", CHUNKED + b"2\n{}\r\n0\r\n\r\n"),
    bad("bare LF after a chunk", CHUNKED + b"2\r\n{}\n0\r\n\r\n"),
    bad("bare LF in a chunk extension", CHUNKED + b"2;a\nb\r\n{}\r\n0\r\n\r\n"),
    bad("a chunk longer than its size", CHUNKED + b"1\r\n{}\r\n0\r\n\r\n"),
    bad("a length among the trailers", CHUNKED + b"2\r\n{}\r\n0\r\ncontent-length: 1\r\n\r\n"),
    bad("no host", LINE + ID + JSON),
    bad("two hosts", HEAD + HOST + JSON),
]  # fmt: skip


_ANSWER = re.compile(rb"HTTP/1\.1 ([345]\d\d) [^\r]*\r\n((?:[^\r]+\r\n)*)\r\n")


def short(out: bytes) -> bytes:
    """What was sent, with errors of ours as the table writes them."""
    found = _ANSWER.search(out)
    if found is None:
        return out
    status, head = found.group(1), found.group(2)
    length = int((re.search(rb"content-length: (\d+)", head) or [0, 0])[1])
    body = out[found.end() : found.end() + length]
    if len(body) < length:  # an answer to HEAD
        return out
    code = (re.search(rb'"code":"(\w+)"', body) or [b"", b"-"])[1]
    closing = b", closing" if b"connection: close\r\n" in head else b""
    mark = b"<%b %b%b>" % (status, code, closing)
    return out[: found.start()] + mark + short(out[found.end() + length :])
