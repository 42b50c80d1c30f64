"""Engines behind TLS: the same transport, and no answer from whom nobody vouches for."""

from __future__ import annotations

import asyncio
import pathlib
import ssl
from collections.abc import Awaitable, Callable, Iterator

import pytest
import uvloop

from broker.config import Config
from broker.errors import ConnectFailed
from broker.types import Instance
from frontend.tokenizer import Ids, Tokenizer
from frontend.upstream.base import UpstreamRequest
from frontend.upstream.http import HttpUpstream
from frontend.upstream.http_pool import trusted
from tests.support.sinks import RecordingSink
from tests.support.waiting import PATIENCE_S

FILES = pathlib.Path(__file__).parents[2] / "fixtures" / "tls"
ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{"input_ids":[7,8]}'


@pytest.fixture(autouse=True)
def authorities(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Trusts the fake engine's certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", str(FILES / "cert.pem"))
    trusted.cache_clear()
    yield monkeypatch
    trusted.cache_clear()


def play(scene: Callable[[HttpUpstream, str], Awaitable[None]]) -> None:
    """With an engine that answers everything with token ids."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            length = 0
            while (line := await reader.readline()) != b"\r\n":
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            await reader.readexactly(length)
            writer.write(ANSWER)
        writer.close()

    async def run() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(FILES / "cert.pem", FILES / "key.pem")
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
        upstream = HttpUpstream(Config())
        try:
            await scene(upstream, f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        finally:
            upstream.close()
            server.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def ask(upstream: HttpUpstream, url: str) -> RecordingSink:
    sink = RecordingSink()
    sink.call = upstream.open(Instance(url=url), UpstreamRequest(path="/p", headers=[], body=b"{}"), sink)
    await asyncio.wait_for(sink.ended.wait(), PATIENCE_S)
    sink.check()
    return sink


def test_an_engine_behind_tls_answers_and_its_connection_is_kept() -> None:
    async def scene(upstream: HttpUpstream, url: str) -> None:
        for _ in range(3):
            assert (await ask(upstream, url)).body == ANSWER[-19:]
        assert "idle=1" in repr(upstream)

    play(scene)


def test_an_engine_that_nobody_vouches_for_is_not_asked(authorities: pytest.MonkeyPatch) -> None:
    authorities.setenv("SSL_CERT_FILE", str(FILES / "nobody.pem"))
    trusted.cache_clear()

    async def scene(upstream: HttpUpstream, url: str) -> None:
        sink = await ask(upstream, url)
        assert isinstance(sink.error, ConnectFailed)
        assert "certificate verify failed" in str(sink.error)

    play(scene)


def test_a_tokenizer_may_be_behind_tls() -> None:
    async def scene(upstream: HttpUpstream, url: str) -> None:
        heard: asyncio.Future[Ids] = asyncio.get_running_loop().create_future()
        tokenizer = Tokenizer(url, 5.0, upstream, asyncio.get_running_loop())
        tokenizer.ask("text", heard.set_result)
        assert list(await heard) == [7, 8]

    play(scene)
