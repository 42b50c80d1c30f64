"""A scripted engine: it records what reaches it, and its answer is what the test says.

    engine.script = refuse(429)            every request from now on
    engine.script = hold(event)            ... and when the test says

It shares nothing with the router: the standard library's server on threads.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

LINGER_OFF = struct.pack("ii", 1, 0)
"""Closing sends a reset."""


class Asked(NamedTuple):
    """A POST that reached the engine."""

    path: str
    headers: list[tuple[str, str]]
    body: bytes
    at: float

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def json(self) -> Any:
        return json.loads(self.body)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        engine = self.server.engine
        with engine.lock:
            engine.gets.append(self.path)
        status, body = engine.pages.get(self.path, (404, b""))
        self.reply(status, body, "text/plain")

    def do_POST(self) -> None:
        engine = self.server.engine
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with engine.lock:
            engine.asked.append(Asked(self.path, self.headers.items(), body, time.monotonic()))
        try:
            engine.script(self)
        except OSError:
            with engine.lock:
                engine.cut.append(time.monotonic())
            self.close_connection = True

    def reply(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def start_stream(self, **headers: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.flush()

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def until_cut(self, event: threading.Event | None = None) -> bool:
        """Waits for the event (True), or until the router has cut the connection (False, and noted)."""
        self.connection.settimeout(0.01)
        while event is None or not event.is_set():
            with contextlib.suppress(TimeoutError):
                if self.connection.recv(1) == b"":
                    with self.server.engine.lock:
                        self.server.engine.cut.append(time.monotonic())
                    self.close_connection = True
                    return False
        self.connection.settimeout(None)
        return True


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    engine: Engine

    def __init__(self, host: str, port: int) -> None:
        super().__init__((host, port), Handler)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Ends the connections that are kept open, too."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that the router has cut."""


Script = Callable[[Handler], None]


class Engine:
    """Owned by a `Router`, which closes it."""

    def __init__(self, role: str, fields: dict[str, object], port: int = 0, host: str = "127.0.0.1") -> None:
        """`host` 0.0.0.0: one server is as many engines as there are addresses of this machine's own."""
        self.lock = threading.Lock()
        self.asked: list[Asked] = []
        self.gets: list[str] = []
        self.cut: list[float] = []
        """When the router gave up a request."""
        self.pages: dict[str, tuple[int, bytes]] = {"/health": (200, b"ok")}
        self.script: Script = answer
        self._server = Server(host, port)
        self._server.engine = self
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.registration = {"role": role, "host_ip": "127.0.0.1", "port": self.port, **fields}
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"Engine({self.url}, asked={len(self.asked)}, cut={len(self.cut)})"

    def probes(self) -> int:
        return self.gets.count("/health")

    def close(self) -> None:
        """Nothing listens any more."""
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        self._thread.join()


# -- scripts -----------------------------------------------------------------------------------------------------


def answer(handler: Handler) -> None:
    """Says who answered what."""
    asked = handler.server.engine.asked[-1]
    handler.reply(200, json.dumps({"from": handler.server.engine.port, "length": len(asked.body)}).encode())


def refuse(status: int, body: bytes = b'{"error":{"message":"no"}}', **headers: str) -> Script:
    return lambda handler: handler.reply(status, body, **headers)


def reset(handler: Handler) -> None:
    """Ends the connection before any header."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_OFF)
    handler.close_connection = True
    handler.connection.close()


def hang(handler: Handler) -> None:
    """Says nothing until the router gives up."""
    handler.until_cut()


def hold(event: threading.Event) -> Script:
    def script(handler: Handler) -> None:
        if handler.until_cut(event):
            answer(handler)

    return script


def stream(chunks: Iterable[bytes], *, end: bool = True) -> Script:
    """A stream of these chunks; without `end`, the connection is cut after the last."""

    def script(handler: Handler) -> None:
        handler.start_stream()
        for data in chunks:
            handler.chunk(data)
        if end:
            handler.end_stream()
        else:
            reset(handler)

    return script


def endless(handler: Handler) -> None:
    """One event, then silence until the router gives up."""
    handler.start_stream()
    handler.chunk(b"data: 1\n\n")
    handler.until_cut()
