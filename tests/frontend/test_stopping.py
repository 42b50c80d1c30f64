"""A connection when its process stops: whoever asks at that moment is answered."""

from __future__ import annotations

import asyncio

import pytest

from tests.frontend.conformance import GOOD, OK, OK_LAST
from tests.frontend.site import Site
from tests.frontend.wire import PATHS, Path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("before", [0, 1, 2])
def test_what_comes_meanwhile_is_answered_as_the_last(site: Site, path: Path, before: int) -> None:
    async def run() -> None:
        wire = site.connect(path)
        for _ in range(before):
            wire.feed(GOOD)
            await wire.settle()
        wire.connection.shutdown()
        assert not wire.transport.is_closing()
        wire.feed(GOOD)
        await wire.settle()
        assert wire.out == OK * before + OK_LAST
        assert wire.transport.is_closing()

    asyncio.run(run())


@pytest.mark.parametrize("path", PATHS)
def test_a_second_word_ends_an_idle_one_at_once(site: Site, path: Path) -> None:
    async def run() -> None:
        wire = site.connect(path)
        wire.feed(GOOD)
        await wire.settle()
        wire.connection.shutdown()
        wire.connection.shutdown()
        assert wire.transport.is_closing()

    asyncio.run(run())
