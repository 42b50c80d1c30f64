"""Connections through TLS: the same protocol, over the transports of both event loops."""

from __future__ import annotations

import asyncio
import pathlib
import ssl
from collections.abc import Callable

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from frontend.api import Inference
from frontend.connection import Connection
from frontend.idle import IdleConnections
from frontend.lean import Lean
from tests.frontend.fakes import Frontend
from tests.frontend.wire import PATHS, Path
from tests.support.waiting import PATIENCE_S, eventually

FILES = pathlib.Path(__file__).parents[1] / "fixtures" / "tls"
REQUEST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-request-id: i\r\ncontent-length: 2\r\n\r\n{}"
SSE = [(b"content-type", b"text/event-stream")]


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(FILES / "cert.pem", FILES / "key.pem")
    client = ssl.create_default_context(cafile=str(FILES / "cert.pem"))
    return server, client


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("path", PATHS)
def test_a_stream_a_request_sent_ahead_and_a_leaving(
    tmp_path: pathlib.Path, path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def test(frontend: Frontend) -> None:
        inference, state = Inference(frontend.config, frontend.forwarder), ServerState()
        config = uvicorn.Config(inference, ws="none", lifespan="off", log_config=None, access_log=False)  # type: ignore[arg-type]  # uvicorn's word for the same
        idle = IdleConnections(asyncio.get_running_loop(), 75.0)
        lean = Lean(inference, state) if path == "lean" else None
        server_side, client_side = contexts()
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(config, state, {}, frontend.counters, idle, lean), "127.0.0.1", 0, ssl=server_side
        )
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_side)
        writer.write(REQUEST + REQUEST)
        await eventually(lambda: len(frontend.http.calls) == 1, "the first at the engine")
        first = frontend.http.last.sink
        first.start(200, SSE)
        for number in range(3):
            first.write(b"data: %d\n\n" % number)
            assert (await asyncio.wait_for(reader.readuntil(b"data: %d\n\n" % number), PATIENCE_S)).endswith(b"\n\n")
        first.finish()
        await eventually(lambda: len(frontend.http.calls) == 2, "the second in its turn")
        second = frontend.http.last
        second.sink.start(200, SSE)
        second.sink.write(b"data: x\n\n")
        await asyncio.wait_for(reader.readuntil(b"data: x\n\n"), PATIENCE_S)
        writer.close()
        await eventually(lambda: second.cancelled, "its leaving is seen")
        await eventually(lambda: not state.connections, "nothing is left")
        assert not any(frontend.in_flight)
        server.close()
        idle.close()

    with Frontend(tmp_path, "http://10.0.0.1:80") as frontend, asyncio.Runner(loop_factory=loop) as runner:
        runner.run(test(frontend))
