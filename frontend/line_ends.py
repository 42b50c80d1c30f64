"""Streams as FastDeploy's router relays them: line by line, each ended by a single newline."""

from __future__ import annotations

from broker.errors import PenstockError
from frontend.upstream.base import Headers, Sink


class LineEnds(Sink):
    """The sink of a request that asked for a stream, in front of the client's: CR LF becomes LF, and the last line
    gets the newline that it lacks. Whatever else a line holds passes unchanged, and nothing waits for its end."""

    __slots__ = ("_last", "_return", "_sink")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._return = False  # the last byte so far was a CR, and is kept until it is known what follows
        self._last = b"\n"

    def start(self, status: int, headers: Headers) -> None:
        # The length may change on the way.
        self._sink.start(status, [header for header in headers if header[0] != b"content-length"])

    def write(self, data: bytes) -> None:
        if self._return:
            data = b"\r" + data
            self._return = False
        if b"\r" in data:
            if data.endswith(b"\r"):
                self._return = True
                data = data[:-1]
            data = data.replace(b"\r\n", b"\n")
        if data:
            self._last = data[-1:]
            self._sink.write(data)

    def finish(self) -> None:
        if self._last != b"\n":  # what is kept is the end of a line without its newline
            self._sink.write(b"\n")
        self._sink.finish()

    def fail(self, error: PenstockError) -> None:
        self._sink.fail(error)
