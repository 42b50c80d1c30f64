"""What is whole goes past the reader, and nobody may tell: it is heard as through it, whatever the engine sends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import Config
from broker.types import Instance
from frontend.outbox import Outlet
from frontend.upstream.base import UpstreamRequest
from frontend.upstream.http import HttpUpstream
from frontend.upstream.http_chunk import chunk_size
from frontend.upstream.http_connection import Connection
from frontend.upstream.http_pool import Pool
from tests.support.sinks import RecordingSink, WholeRecordingSink

URL = "http://10.0.0.1:80"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def ok(body: bytes) -> bytes:
    return OK % (len(body), body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Transport:
    """A network that takes what is written, but for `unsent` bytes."""

    def __init__(self) -> None:
        self.aborted = False
        self.unsent = 0

    def write(self, data: bytes) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    def get_extra_info(self, name: str) -> None:
        """It has no socket."""

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


class Engine:
    """One kept connection to an engine; the test plays what it sends."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.upstream = HttpUpstream(Config())
        self.pool = self.upstream._pools[URL] = Pool(URL, 8, loop, known=self.upstream._known)
        self.connect()

    def connect(self) -> None:
        self.transport = Transport()
        connection = Connection(self.pool, cast("None", None), asyncio.get_running_loop())  # type: ignore[arg-type]  # it was dialled for nobody
        connection._transport = transport = cast("asyncio.Transport", self.transport)
        connection._outlet = Outlet(transport, self.pool.outbox)
        self.pool._connections.add(connection)
        self.pool.spare(connection)
        self.connection = connection

    def ask(self, sink: RecordingSink, method: str = "POST", *, sends: bool = True) -> None:
        """`sends`: the turn of the loop ends, and the request is written."""
        request = UpstreamRequest(path="/p", headers=[], body=b"{}", method=method)
        sink.call = self.upstream.open(Instance(url=URL), request, sink)
        if sends:
            self.pool.outbox.flush()

    def says(self, *pieces: bytes) -> None:
        for piece in pieces:
            if not self.transport.aborted:
                self.connection.data_received(piece)


class Heard(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    error: str
    is_kept: bool


async def heard(kind: type[RecordingSink], *answers: Sequence[bytes]) -> tuple[list[Heard], list[RecordingSink]]:
    """The answers on one connection, or on a new one where the last one was not kept."""
    engine = Engine()
    found, sinks = [], []
    for pieces in answers:
        if engine.transport.aborted:
            engine.connect()
        sink = kind()
        engine.ask(sink)
        engine.says(*pieces)
        sink.check()
        found.append(Heard(sink.status, sink.headers, sink.body, str(sink.error), not engine.transport.aborted))
        sinks.append(sink)
        if not sink.ended.is_set():
            sink.leave()
    engine.upstream.close()
    return found, sinks


def play(scene: Callable[[], object]) -> None:
    async def run() -> None:
        await scene()  # type: ignore[misc]  # each scene is a coroutine function

    asyncio.run(run())


ANSWERS: dict[str, Sequence[bytes]] = {
    "whole": [ok(b"{}")],
    "of another length": [ok(b"x" * 1000)],
    "another head": [ok(b"{}").replace(b"json", b"jsom")],
    "in two pieces": [ok(b"{}")[:60], ok(b"{}")[60:]],
    "head first": [ok(b"{}")[:-2], b"{}"],
    "empty": [ok(b"")],
    "garbage behind": [ok(b"{}") + b"x"],
    "two at once": [ok(b"{}") * 2],
    "not kept": [ok(b"{}").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")],
    "an error": [ok(b"{}").replace(b"200 OK", b"404 Not Found")],
    "an interim answer": [b"HTTP/1.1 100 Continue\r\n\r\n" + ok(b"{}")],
    "two lengths": [ok(b"{}").replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\n")],
    "a length that is none": [ok(b"{}").replace(b": 2", b": +2")],
    "a stream": [HEAD, chunk(b"data: 1\n\n"), chunk(b"data: 2\n\n"), END],
    "a stream in other pieces": [
        HEAD + chunk(b"a"),
        chunk(b"b") + chunk(b"c"),
        chunk(b"dd")[:3],
        chunk(b"dd")[3:],
        END,
    ],
    "a stream, its end with the last event": [HEAD, chunk(b"a"), chunk(b"b") + END],
    "a stream with extensions": [HEAD, chunk(b"a"), b"1;x=y\r\nb\r\n", chunk(b"c"), END],
    "a stream with trailers": [HEAD, chunk(b"a"), b"0\r\nX-T: 1\r\n\r\n"],
    "sizes in capitals and with zeros": [HEAD, chunk(b"a"), b"000A\r\n0123456789\r\n", END],
    "a chunk in a chunk": [HEAD, chunk(b"a"), chunk(chunk(b"b") + END), END],
    "a chunk cut where it looks whole": [HEAD, chunk(b"a"), b"8\r\n1\r\nb\r\n", b"cd\r\n", END],
    "a size cut where its rest looks like a chunk": [
        HEAD,
        chunk(b"a"),
        b"1;x\r\nb\r\n1",
        b"5\r\nhello\r\n",
        b"x" * 14 + b"\r\n",
        END,
    ],
    "a stream that breaks": [HEAD, chunk(b"a"), b"zz\r\nb\r\n"],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_heard_alike_each_time_and_by_each_kind_of_sink(name: str) -> None:
    async def scene() -> None:
        answers = [ANSWERS["whole"], ANSWERS[name], ANSWERS[name], ANSWERS["whole"]]
        plain, _ = await heard(RecordingSink, *answers)
        whole, _ = await heard(WholeRecordingSink, *answers)
        assert whole == plain
        assert plain[1] == plain[2]
        assert plain[0] == plain[3]

    play(scene)


def test_what_is_whole_goes_past_the_reader() -> None:
    async def scene() -> None:
        stream = ANSWERS["a stream"]
        _, sinks = await heard(WholeRecordingSink, [ok(b"1")], [ok(b"22")], stream, stream, [ok(b"333")])
        assert [cast("WholeRecordingSink", sink).whole for sink in sinks] == [0, 1, 1, 1, 1]

    play(scene)


@pytest.mark.parametrize("sends", [True, False])
def test_an_answer_before_its_request_is_sent_does_not_keep_the_connection(sends: bool) -> None:
    async def scene() -> None:
        engine = Engine()
        engine.ask(WholeRecordingSink())
        engine.says(ok(b"{}"))
        sink = WholeRecordingSink()
        engine.ask(sink, sends=sends)
        engine.transport.unsent = 5 if sends else 0
        engine.says(ok(b"{}"))
        assert (sink.body, sink.whole, engine.transport.aborted) == (b"{}", 0, True)

    play(scene)


def test_an_answer_to_head_has_no_body_although_its_head_is_known() -> None:
    async def scene() -> None:
        engine = Engine()
        engine.ask(WholeRecordingSink())
        engine.says(ok(b"{}"))
        sink = WholeRecordingSink()
        engine.ask(sink, "HEAD")
        engine.says(ok(b"{}"))
        assert (sink.status, sink.body, sink.ended.is_set(), sink.whole) == (200, b"", True, 0)

    play(scene)


def test_a_paused_sink_gets_neither_chunk_nor_answer_and_all_in_order_afterwards() -> None:
    async def scene() -> None:
        engine = Engine()
        sink = WholeRecordingSink()
        engine.ask(sink)
        engine.says(HEAD, chunk(b"a"), chunk(b"b"))
        sink.pause()
        engine.says(chunk(b"c"))
        sink.resume()
        engine.says(chunk(b"d"))
        await asyncio.sleep(0)
        engine.says(chunk(b"e"), END)
        sink.check()
        assert (sink.body, sink.events[-1]) == (b"abcde", "finish")

        late = WholeRecordingSink()
        engine.ask(late)
        engine.says(ok(b"{}"))
        assert late.body == b"{}"
        last = WholeRecordingSink()
        engine.ask(last)
        last.pause()
        engine.says(ok(b"{}"))
        assert not last.events
        last.resume()
        await asyncio.sleep(0)
        last.check()
        assert last.body == b"{}"

    play(scene)


def test_after_cancelling_within_a_chunk_nothing_is_heard() -> None:
    async def scene() -> None:
        engine = Engine()
        sink = WholeRecordingSink()
        engine.ask(sink)
        engine.says(HEAD, chunk(b"a"))
        sink.on_write = sink.leave
        engine.says(chunk(b"b"), chunk(b"c"))
        sink.check()
        assert sink.body == b"ab"

    play(scene)


def written(data: bytes, digits: int, *, upper: bool) -> bytes:
    """A chunk with a size of at least so many digits."""
    size = b"%0*x" % (digits, len(data))
    return (size.upper() if upper else size) + b"\r\n" + data + b"\r\n"


@given(
    st.binary(max_size=40)
    | st.binary(min_size=1, max_size=20).map(chunk)
    | st.builds(written, st.binary(max_size=300), st.integers(1, 9), upper=st.booleans())
)
def test_a_chunk_is_one_only_if_it_reads_so(data: bytes) -> None:
    line, _, rest = data.partition(b"\r\n")
    is_hex = 0 < len(line) <= 7 and all(byte in b"0123456789abcdefABCDEF" for byte in line)
    size = int(line, 16) if is_hex else 0
    is_whole = size > 0 and len(rest) == size + 2 and rest.endswith(b"\r\n")
    assert chunk_size(data) == (size if is_whole else 0)
