"""Clients that send large bodies slowly hold a bounded amount of memory together, whatever they do next."""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Awaitable, Callable, Iterator

import pytest

from broker.config import Server
from broker.errors import ReceivingFull
from frontend.receiving import Receiving
from tests.frontend.conformance import GOOD, HEAD, OK, short
from tests.frontend.site import Site
from tests.frontend.wire import PATHS, Path, Wire

MOST = 2048
SIZE = MOST
BODY = b"{" + b" " * (SIZE - 2) + b"}"
BEGUN = HEAD + b"content-length: %d\r\n\r\n" % SIZE
FULL = b"<503 receiving_full>"


@pytest.fixture
def bounded(tmp_path: pathlib.Path) -> Iterator[Site]:
    it = Site(tmp_path, Server(max_body_bytes=MOST, max_receiving_bytes=MOST))
    yield it
    it.frontend.close()


def held(site: Site) -> int:
    return site.inference.receiving.held


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await scene()

    asyncio.run(run())


@pytest.mark.parametrize("path", PATHS)
def test_the_one_that_grows_beyond_it_is_refused_and_the_others_go_on(bounded: Site, path: Path) -> None:
    async def scene() -> None:
        first = await bounded.fed(path, BEGUN + BODY[:1500])
        second = await bounded.fed(path, BEGUN, BODY[:500])
        assert held(bounded) == 2000
        second.feed(BODY[500:600])
        await second.settle()
        assert short(second.out) == FULL
        assert b"retry-after: 1\r\n" in second.out
        assert held(bounded) == 1500
        for read in (BODY[600:1700], BODY[1700:] + GOOD):  # nothing of the rest is kept, and it is no request
            second.feed(read)
            await second.settle()
            assert held(bounded) == 1500
        assert short(second.out) == FULL + OK
        first.feed(BODY[1500:])
        await first.settle()
        assert (first.out, held(bounded), bounded.engine.bodies) == (OK, 0, [b"{}", BODY])
        for wire in (first, second):
            wire.close()

    play(scene)


@pytest.mark.parametrize("path", PATHS)
def test_a_body_in_one_read_is_taken_however_full_it_is(bounded: Site, path: Path) -> None:
    async def scene() -> None:
        slow = await bounded.fed(path, BEGUN + BODY[:-1])
        for reads in ([BEGUN + BODY], [BEGUN, BODY], [GOOD]):
            wire = await bounded.fed(path, *reads)
            assert wire.out == OK
            wire.close()
        assert held(bounded) == SIZE - 1
        slow.close()

    play(scene)


def leave(wire: Wire) -> None:
    wire.transport.end()


def reset(wire: Wire) -> None:
    wire.transport.reset()


def stop(wire: Wire) -> None:
    wire.connection.idled()


def finish(wire: Wire) -> None:
    wire.feed(BODY[1000:])


def spoil(wire: Wire) -> None:
    wire.feed(BODY[1000:] + b"no request\r\n\r\n")


@pytest.mark.parametrize("end", [leave, reset, stop, finish, spoil])
@pytest.mark.parametrize("path", PATHS)
def test_however_a_body_ends_it_counts_no_more(bounded: Site, path: Path, end: Callable[[Wire], None]) -> None:
    async def scene() -> None:
        wire = await bounded.fed(path, BEGUN, BODY[:400], BODY[400:1000])
        assert held(bounded) == 1000
        end(wire)
        await wire.settle()
        assert held(bounded) == 0
        wire.close()

    play(scene)


@pytest.mark.parametrize("path", PATHS)
def test_one_that_waits_for_its_turn_gives_back_what_it_held(bounded: Site, path: Path) -> None:
    async def scene() -> None:
        wire = bounded.connect(path)
        wire.feed(GOOD + BEGUN + BODY[:1000])
        await wire.settle()
        wire.feed(BODY[1000:])
        await wire.settle()
        assert (wire.out, held(bounded)) == (OK * 2, 0)
        wire.close()

    play(scene)


def test_what_does_not_fit_does_not_count() -> None:
    receiving = Receiving(10)
    receiving.take(10)
    with pytest.raises(ReceivingFull):
        receiving.take(1)
    assert receiving.held == 10
