"""Penstock's side of the native protocol, written from docs/wire.md alone with plain sockets and plain msgpack.

It imports nothing of Penstock: what an engine says to this, it says to any client written from the document.
`RawPenstock` is a scheduler and the `/endpoints` route, `RawFrontend` one data connection. Everything blocks, with a
deadline; messages are plain lists.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import msgpack
import zmq

PROTOCOL = 1
WITHIN_S = 60.0

ENGINE_HELLO, ENGINE_BEAT, ENGINE_GOODBYE = 32, 33, 34
ACCEPTED, REFUSED, SCHEDULER_BEAT, HELLO_AGAIN = 48, 49, 50, 51
DATA_HELLO, PING, REQUEST, ABORT = 64, 65, 66, 67
DATA_WELCOME, PONG, STEP = 80, 81, 82
CHUNK, DONE, ERROR = 0, 1, 2

Message = list[Any]


class RawPenstock:
    """A run of one: HTTP for `/endpoints`, the control ROUTER, the load SUB. A context manager."""

    def __init__(self, port: int = 0, run: str = "") -> None:
        """`port`: that of an earlier run, to take its place."""
        self.run = run or os.urandom(4).hex()
        self._dir = tempfile.mkdtemp(prefix="raw-")  # short: a unix socket's path has at most 107 bytes
        self._context = zmq.Context()
        self.control = self._context.socket(zmq.ROUTER)
        self.control.bind(f"ipc://{self._dir}/engines.sock")
        self.load = self._context.socket(zmq.SUB)
        self.load.bind(f"ipc://{self._dir}/load.sock")
        self.load.subscribe(b"load")
        answer = json.dumps(
            {
                "protocol": PROTOCOL,
                "run": self.run,
                "control": [f"ipc://{self._dir}/engines.sock"],
                "load": [f"ipc://{self._dir}/load.sock"],
            }
        ).encode()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/endpoints" else 404)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port: int = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self.control.close(linger=0)
        self.load.close(linger=0)
        self._context.term()
        shutil.rmtree(self._dir, ignore_errors=True)

    def hear(self, tag: int, within: float = WITHIN_S) -> tuple[bytes, Message]:
        """The next control message with that tag, and who said it; others are dropped."""
        for peer, frame in frames_of(self.control, within):
            message = msgpack.unpackb(frame)
            if message[0] == tag:
                return peer, message
        raise AssertionError(f"no control message {tag} within {within} s")

    def say(self, peer: bytes, *message: object) -> None:
        self.control.send_multipart([peer, msgpack.packb(list(message))])

    def accept(self, epoch: int = 1) -> Message:
        """Waits for a hello and accepts it; gives the hello."""
        peer, hello = self.hear(ENGINE_HELLO)
        self.say(peer, ACCEPTED, PROTOCOL, epoch)
        return hello

    def loads(self, within: float = WITHIN_S) -> Iterator[tuple[int, Message]]:
        """Sequence and load of each report, as they come."""
        for topic, sequence, load in frames_of(self.load, within):
            assert topic == b"load"
            yield int.from_bytes(sequence, "big"), msgpack.unpackb(load)

    def await_load(self, running: int, waiting: int) -> Message:
        for _, load in self.loads():
            if load[2:4] == [running, waiting]:
                return load
        raise AssertionError(f"no load with {running} running and {waiting} waiting")


class RawFrontend:
    """One data connection to an engine. A context manager. Pings only when told to."""

    def __init__(self, endpoint: str, incarnation: bytes) -> None:
        self.incarnation = incarnation
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.connect(endpoint)
        self._steps: list[Message] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close(linger=0)
        self._context.term()

    def say(self, *message: object) -> None:
        self.socket.send(msgpack.packb(list(message)))

    def hello(self, epoch: int = 1) -> Message:
        self.say(DATA_HELLO, PROTOCOL, epoch)
        return self.hear(DATA_WELCOME)

    def request(
        self,
        number: int,
        body: object,
        *,
        path: str = "/v1/completions",
        stream: bool = True,
        headers: dict[str, str] | None = None,
        transfer: bytes = b"",
        incarnation: bytes | None = None,
    ) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        whom = self.incarnation if incarnation is None else incarnation
        head = [REQUEST, whom, number, path, stream, headers or {}, transfer]
        self.socket.send_multipart([msgpack.packb(head), raw])

    def abort(self, *numbers: int) -> None:
        self.say(ABORT, list(numbers))

    def hear(self, tag: int, within: float = WITHIN_S) -> Message:
        """The next message with that tag; steps that come before it are kept for `step`."""
        if tag == STEP and self._steps:
            return self._steps.pop(0)
        for (frame,) in frames_of(self.socket, within):
            message = msgpack.unpackb(frame)
            if message[0] == tag:
                return message
            if message[0] == STEP:
                self._steps.append(message)
        raise AssertionError(f"no data message {tag} within {within} s")

    def step(self, within: float = WITHIN_S) -> list[Message]:
        """The deltas of the next step."""
        _, incarnation, deltas = self.hear(STEP, within)
        assert incarnation == self.incarnation
        return deltas

    def answer(self, number: int) -> tuple[int, bytes]:
        """Status and body of one request, its sequence checked; deltas of others are lost."""
        return self.answers(number)[number]

    def answers(self, *numbers: int) -> dict[int, tuple[int, bytes]]:
        """Status and body of several requests."""
        next_sequence = dict.fromkeys(numbers, 0)
        bodies = dict.fromkeys(numbers, b"")
        ended: dict[int, tuple[int, bytes]] = {}
        while len(ended) < len(numbers):
            for number, sequence, kind, data, *status in self.step():
                if number not in next_sequence:
                    continue
                assert number not in ended, f"request {number} goes on after its end"
                assert sequence == next_sequence[number], f"request {number}: a gap"
                next_sequence[number] += 1
                if kind == ERROR:
                    ended[number] = status[0], data
                    continue
                bodies[number] += data
                if kind == DONE:
                    ended[number] = 200, bodies[number]
        return ended

    def received(self) -> list[Message]:
        """The deltas that are here already."""
        waiting = [msgpack.unpackb(frame) for (frame,) in frames_of(self.socket, 0.2)]
        return [delta for message in [*self._steps, *waiting] if message[0] == STEP for delta in message[2]]

    def is_quiet(self, within: float) -> bool:
        """Nothing but pongs comes for so long."""
        return all(msgpack.unpackb(frame)[0] == PONG for (frame,) in frames_of(self.socket, within))


def frames_of(socket: zmq.Socket[bytes], within: float) -> Iterator[list[bytes]]:
    """Messages as they come, until the deadline."""
    deadline = time.monotonic() + within
    while (left := deadline - time.monotonic()) > 0:
        if socket.poll(int(left * 1000) + 1):
            with contextlib.suppress(zmq.Again):
                yield socket.recv_multipart(zmq.NOBLOCK)
