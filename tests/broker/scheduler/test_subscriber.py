"""A SUB without libzmq, against libzmq's PUBs and against what is none."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from broker import zmtp
from broker.errors import UpstreamBroken
from broker.port import Frames
from broker.scheduler.subscriber import Subscriber
from tests.support.processes import free_port
from tests.support.waiting import eventually

LIMIT = 1000


class Site:
    """A subscriber on the running loop, and what it has heard and refused."""

    def __init__(self, endpoint: str, **options: Any) -> None:
        self.endpoint = endpoint
        self.heard: list[Frames] = []
        self.looked_after = 0
        """Messages heard when the last look was over."""
        self.refused: list[UpstreamBroken] = []
        self.fails = False
        self._publishers = 0
        self.subscriber = Subscriber(
            asyncio.get_running_loop(),
            b"t",
            self._hear,
            self._look,
            self.refused.append,
            most_parts=3,
            limit=LIMIT,
            rest_s=0.005,
            **options,
        )
        self.subscriber.bind(endpoint)

    def _look(self) -> None:
        self.looked_after = len(self.heard)

    def _hear(self, frames: Frames) -> None:
        self.heard.append(frames)
        if self.fails:
            raise ValueError("a bug")

    @contextlib.asynccontextmanager
    async def publisher(self) -> AsyncIterator[zmq.Socket[bytes]]:
        """A PUB of libzmq that is known to be heard."""
        with zmq.Context() as context, context.socket(zmq.PUB) as socket:
            socket.linger = 0
            socket.connect(self.endpoint)
            self._publishers += 1
            await self.until_heard(socket, [b"t", b"are you there? %d" % self._publishers])
            yield socket

    def numbers(self, topic: bytes = b"t") -> list[int]:
        """What was heard with that topic, of the messages with a number."""
        return [int(f[1]) for f in self.heard if f[0] == topic and f[1].isdigit()]

    async def until_heard(self, socket: zmq.Socket[bytes], frames: Frames) -> None:
        def is_heard() -> bool:
            socket.send_multipart(frames)
            return frames in self.heard

        await eventually(is_heard, self)

    def raw(self) -> socket.socket:
        """A connection that says what the test wants."""
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(self.endpoint.removeprefix("ipc://"))
        raw.settimeout(0)
        return raw


def scene(act: Callable[[Site], Awaitable[None]], endpoint: str, **options: Any) -> None:
    async def run() -> None:
        it = Site(endpoint, **options)
        try:
            await act(it)
        finally:
            it.subscriber.close()
            it.subscriber.close()

    asyncio.run(run())


async def ended(raw: socket.socket) -> bytes:
    """What it was told until its connection ended."""
    told = b""

    def is_ended() -> bool:
        nonlocal told
        with contextlib.suppress(BlockingIOError):
            try:
                data = raw.recv(4096)
            except ConnectionResetError:
                data = b""
            told += data
            return not data
        return False

    await eventually(is_ended, raw)
    return told


@pytest.mark.parametrize("kind", ["ipc", "abstract", "tcp", "any"])
def test_libzmqs_publishers_are_heard_in_their_order_over_every_way(kind: str, tmp_path: Path) -> None:
    endpoints = {
        "ipc": f"ipc://{tmp_path}/s",
        "abstract": f"ipc://@{tmp_path}",
        "tcp": f"tcp://127.0.0.1:{free_port()}",
    }
    port = free_port()

    async def act(it: Site) -> None:
        if kind == "any":
            it.endpoint = f"tcp://127.0.0.1:{port}"
        async with it.publisher() as one, it.publisher() as two:
            for number in range(300):
                one.send_multipart([b"t1", b"%d" % number, b"x" * number])
                two.send_multipart([b"t2", b"%d" % number])
                two.send_multipart([b"not wanted"])
            await eventually(lambda: it.numbers(b"t1")[-1:] == it.numbers(b"t2")[-1:] == [299], it.heard)
            assert it.numbers(b"t1") == it.numbers(b"t2") == [*range(300)]
            assert all(f[2] == b"x" * int(f[1]) for f in it.heard if f[0] == b"t1")
        assert not it.refused

    scene(act, endpoints.get(kind, f"tcp://*:{port}"))


def test_what_is_too_much_for_one_look_is_heard_in_the_next(tmp_path: Path) -> None:
    async def act(it: Site) -> None:
        async with it.publisher() as one:
            for number in range(200):
                one.send_multipart([b"t", b"%d" % number, b"x" * 100])
            await eventually(lambda: it.numbers()[-1:] == [199], it.heard)
            assert it.numbers() == [*range(200)]
            assert it.looked_after == len(it.heard)

    scene(act, f"ipc://{tmp_path}/s", read_bytes=64)


def test_of_a_message_of_too_many_frames_the_first_are_heard(tmp_path: Path) -> None:
    async def act(it: Site) -> None:
        async with it.publisher() as one:
            one.send_multipart([b"t", *(b"%d" % n for n in range(1000))])
            await it.until_heard(one, [b"t", b"next"])
            assert [b"t", b"0", b"1"] in it.heard

    scene(act, f"ipc://{tmp_path}/s")


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" * 5, "does not speak ZMTP"),
        (zmtp.GREETING + zmtp.ready(b"", b"PUB") + zmtp.head(LIMIT + 1) + bytes(LIMIT + 1), "limit is 1000"),
    ],
)
def test_who_is_no_publisher_is_refused_and_the_others_are_heard(tmp_path: Path, said: bytes, why: str) -> None:
    async def act(it: Site) -> None:
        async with it.publisher() as one:
            with it.raw() as raw:
                raw.sendall(said)
                await ended(raw)
            assert [why in str(e) for e in it.refused] == [True]
            await it.until_heard(one, [b"t", b"still"])

    scene(act, f"ipc://{tmp_path}/s")


def test_who_says_nothing_is_let_go(tmp_path: Path) -> None:
    async def act(it: Site) -> None:
        async with it.publisher() as one:
            with it.raw() as raw:
                assert await ended(raw) == zmtp.GREETING + zmtp.ready(b"", b"SUB")
            assert "publishers=1" in repr(it.subscriber)
            await it.until_heard(one, [b"t", b"still"])

    scene(act, f"ipc://{tmp_path}/s", handshake_s=0.05)


def test_a_ping_is_answered(tmp_path: Path) -> None:
    async def act(it: Site) -> None:
        with it.raw() as raw:
            raw.sendall(zmtp.GREETING + zmtp.ready(b"", b"PUB") + b"\4\x0b\4PING\0\1ctx4")
            told = zmtp.GREETING + zmtp.ready(b"", b"SUB") + zmtp.subscription(b"t") + b"\4\x09\4PONGctx4"
            heard = b""

            def is_told() -> bool:
                nonlocal heard
                with contextlib.suppress(BlockingIOError):
                    heard += raw.recv(4096)
                return len(heard) >= len(told)

            await eventually(is_told, raw)
            assert heard == told

    scene(act, f"ipc://{tmp_path}/s")


def test_a_receiver_that_raises_leaves_nothing_unheard(tmp_path: Path) -> None:
    async def act(it: Site) -> None:
        failed: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
        async with it.publisher() as one:
            it.fails = True
            for number in range(5):
                one.send_multipart([b"t", b"%d" % number])
            await eventually(lambda: it.numbers() == [*range(5)], it.heard)
            assert len(failed) >= 5
            assert all(type(context["exception"]) is ValueError for context in failed)

    scene(act, f"ipc://{tmp_path}/s")


def test_an_endpoint_that_is_taken_is_an_error() -> None:
    async def act(it: Site) -> None:
        with pytest.raises(OSError, match="in use"):
            it.subscriber.bind(it.endpoint)

    scene(act, f"tcp://127.0.0.1:{free_port()}")
