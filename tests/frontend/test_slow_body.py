"""A client that stops in the middle of a body holds what it has sent, and is not waited for without end."""

from __future__ import annotations

import asyncio

import pytest

from tests.frontend.conformance import GOOD, HEAD, LIVE, OK, short
from tests.frontend.site import Site
from tests.frontend.wire import PATHS, Path

HALF = HEAD + b"content-length: 3\r\n\r\n{}"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("reads", [[HALF], [HALF[:-1], b"}"], [GOOD, HALF], [GOOD + HALF], [LIVE, HALF]])
def test_it_is_told_so_and_left(site: Site, path: Path, reads: list[bytes]) -> None:
    async def run() -> None:
        wire = await site.fed(path, *reads)
        assert len(wire.idle) == 1
        wire.connection.idled()
        await wire.settle()
        assert short(wire.out).endswith(b"<408 body_too_slow, closing>")
        assert wire.transport.lost
        assert site.is_idle

    asyncio.run(run())


@pytest.mark.parametrize("path", PATHS)
def test_one_that_goes_on_is_waited_for(site: Site, path: Path) -> None:
    async def run() -> None:
        wire = await site.fed(path, HALF[:-2])
        for byte in (b"{", b"}"):
            since = wire.connection._silence.since
            await asyncio.sleep(0.002)
            wire.feed(byte)
            assert wire.connection._silence.since > since
        wire.feed(b" ")
        assert len(wire.idle) == 0
        await wire.settle()
        assert (wire.out, len(wire.idle)) == (OK, 1)
        wire.close()

    asyncio.run(run())


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_under_way_is_not_ended_by_a_slow_request_behind_it(site: Site, path: Path) -> None:
    async def run() -> None:
        wire = site.connect(path)
        wire.feed(GOOD)
        wire.feed(HALF)
        wire.connection.idled()
        await wire.settle()
        assert wire.out == OK
        assert len(wire.idle) == 1  # from now on the second one is waited for
        wire.close()

    asyncio.run(run())
