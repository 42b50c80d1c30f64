"""What the short way takes for granted of loops, and what becomes of streams when it has troubles of its own."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, NoReturn, cast

import pytest

from broker.config import Config
from frontend import conduit
from frontend.upstream.base import UpstreamRequest
from frontend.upstream.http import HttpUpstream
from frontend.upstream.http_intake import HttpIntake
from tests.frontend.flowing import LOOPS, Player, Stage
from tests.support.fake_engines import HttpAsked, HttpEngine
from tests.support.sinks import WholeRecordingSink
from tests.support.waiting import PATIENCE_S, eventually

EVENT = b"data: 1\n\n"


# -- descriptors ---------------------------------------------------------------------------------------------


class Noting(asyncio.Protocol):
    """Whether its descriptor was still that of its socket when it heard of the end."""

    def __init__(self) -> None:
        self.was_open: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.descriptor = transport.get_extra_info("socket").fileno()
        self.inode = os.fstat(self.descriptor).st_ino

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            self.was_open.set_result(os.fstat(self.descriptor).st_ino == self.inode)
        except OSError:
            self.was_open.set_result(False)


def reset(protocol: Noting, peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


ENDS: dict[str, Callable[[Noting, socket.socket], None]] = {
    "closed": lambda protocol, peer: protocol.transport.close(),
    "aborted": lambda protocol, peer: protocol.transport.abort(),
    "left": lambda protocol, peer: peer.close(),
    "reset": reset,
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_transport_closes_its_descriptor_only_when_its_protocol_has_heard(
    loop: str, end: Callable[[Noting, socket.socket], None]
) -> None:
    """Until then a conduit may use the number; afterwards it may be another connection's."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            peer = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        with peer:
            _, protocol = await asyncio.get_running_loop().create_connection(Noting, sock=ours)
            end(protocol, peer)
            assert await asyncio.wait_for(protocol.was_open, PATIENCE_S)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())


def test_without_a_descriptor_for_it_streams_go_the_long_way(player: Player, caplog: pytest.LogCaptureFixture) -> None:
    def refused() -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def scene(stage: Stage) -> None:
        vars(conduit.compiled)["Intake"] = refused
        for ident in (b"r1", b"r2"):
            client = stage.client()
            client.ask(ident)
            asked = await stage.engine.asked()
            asked.chunk(EVENT)
            await client.hears(EVENT)
            await stage.says(client, asked, EVENT, EVENT)
            asked.done(EVENT)
            await client.hears_the_end()

    seen = player.play("http", scene)
    assert seen.passed == 0
    (first, second) = seen.bodies
    assert first == second
    assert first.count(EVENT) == 4
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1  # said once


# -- what the intake gives back ------------------------------------------------------------------------------


class Parting:
    """In a connection's place."""

    def __init__(self, notes: list[tuple[Any, ...]], error: Exception | None = None) -> None:
        self._notes = notes
        self._error = error

    def parted(self, read: bytes, unsent: bytes) -> None:
        self._notes.append((read, unsent))
        if self._error is not None:
            raise self._error

    def break_off(self) -> None:
        self._notes.append(("broken off",))


def test_one_connections_trouble_does_not_cost_the_others_their_bytes() -> None:
    notes: list[tuple[Any, ...]] = []
    error = ValueError("a bug")

    class Intake:
        def turn(self, now: float) -> list[tuple[Parting, bytes, bytes]]:
            return [(Parting(notes), b"1", b""), (Parting(notes, error), b"2", b""), (Parting(notes), b"", b"3")]

    async def run() -> None:
        loop = asyncio.get_running_loop()
        heard: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: heard.append(context))
        intake = HttpIntake(loop)
        intake._intake = Intake()
        intake._turn()
        assert [context["exception"] for context in heard] == [error]

    asyncio.run(run())
    assert notes == [(b"1", b""), (b"2", b""), ("broken off",), (b"", b"3")]


async def streaming(upstream: HttpUpstream, engine: HttpEngine) -> tuple[WholeRecordingSink, HttpAsked]:
    """A stream whose first event its sink has heard."""
    sink = WholeRecordingSink()
    sink.call = upstream.open(engine.instance, UpstreamRequest(path="/p", headers=[], body=b"{}"), sink)
    asked = await engine.asked()
    asked.chunk(EVENT)
    await eventually(lambda: sink.body == EVENT, sink)
    return sink, asked


def play(scene: Callable[[HttpUpstream, HttpEngine], Any], loop: str) -> None:
    async def run() -> None:
        engine = await HttpEngine.open()
        upstream = HttpUpstream(Config())
        try:
            await scene(upstream, engine)
        finally:
            upstream.close()
            engine.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())


@pytest.mark.parametrize("loop", LOOPS)
def test_what_was_read_for_one_that_has_paused_meanwhile_is_kept_for_it(loop: str) -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        sink, asked = await streaming(upstream, engine)
        (connection,) = next(iter(upstream._pools.values()))._connections
        sink.pause()
        connection.parted(b"9\r\ndata: 2\n\n\r\n9\r\nda", b"")
        asked.raw(b"ta: 3\n\n\r\n")
        asked.done(b"data: 4\n\n")
        assert sink.body == EVENT
        sink.resume()
        await asyncio.wait_for(sink.ended.wait(), PATIENCE_S)
        sink.check()
        assert sink.body == EVENT + b"data: 2\n\ndata: 3\n\ndata: 4\n\n"
        assert sink.error is None

    play(scene, loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_one_that_breaks_off_hears_of_it(loop: str) -> None:
    async def scene(upstream: HttpUpstream, engine: HttpEngine) -> None:
        sink, _ = await streaming(upstream, engine)
        (connection,) = next(iter(upstream._pools.values()))._connections
        connection.break_off()
        await asyncio.wait_for(sink.ended.wait(), PATIENCE_S)
        sink.check()
        assert sink.error is not None

    play(scene, loop)
