"""Whatever happens while a request goes the short way, the client and uvicorn see what they see of any other."""

from __future__ import annotations

import asyncio
import gc
import re
import weakref
from collections.abc import Awaitable, Callable

import pytest

from broker.counters import TotalColumn
from frontend.client import Client
from tests.frontend.conformance import GOOD, OK, OK_LAST
from tests.frontend.fakes import FakeUpstream
from tests.frontend.site import Site
from tests.frontend.wire import Wire

ASK = GOOD.replace(b"x-request-id: i\r\n", b"")
"""Its head is good for others, as it has no name of its own."""
LENGTH: list[tuple[bytes, bytes]] = [(b"content-length", b"2")]


def client(wire: Wire) -> Client:
    """What the transport calls."""
    found = wire.transport.protocol
    assert isinstance(found, Client)
    return found


class Held:
    """A connection whose first request went the long way, and the second is under way; its engine is the test's."""

    def __init__(self, site: Site) -> None:
        self.engine = FakeUpstream()
        site.frontend.forwarder._http = self.engine
        self.site = site
        self.wire = site.connect("lean")

    async def begin(self) -> None:
        self.wire.feed(ASK)
        await self.answer()
        assert self.out == OK
        self.wire.transport.pieces.clear()
        self.wire.feed(ASK)
        assert len(self.engine.calls) == 2
        assert client(self.wire).has_served

    @property
    def out(self) -> bytes:
        """What the client got, each answer with the same name."""
        return re.sub(rb"x-request-id: [0-9a-f]{24}", b"x-request-id: i", self.wire.out)

    async def answer(self) -> None:
        self.engine.last.answer(b"{}", headers=LENGTH)
        await self.wire.settle()


def held(site: Site, test: Callable[[Held], Awaitable[None]]) -> None:
    async def run() -> None:
        it = Held(site)
        await it.begin()
        await test(it)
        it.wire.close()
        await it.wire.settle()
        assert not it.wire.state.connections
        assert not len(it.wire.idle)
        assert not it.site.frontend.forwarder.live

    asyncio.run(run())


def test_a_request_of_the_short_way_is_in_uvicorns_accounts(site: Site) -> None:
    async def test(it: Held) -> None:
        assert it.wire.state.connections == {it.wire.connection}
        assert not len(it.wire.idle)
        await it.answer()
        assert it.out == OK
        assert it.wire.state.total_requests == 2
        assert len(it.wire.idle) == 1

    held(site, test)


@pytest.mark.parametrize("cut", [1, 40, len(ASK) - 1, len(ASK)])
def test_what_comes_meanwhile_has_its_turn_behind_it(site: Site, cut: int) -> None:
    async def test(it: Held) -> None:
        it.wire.feed(ASK[:cut])
        await it.answer()
        assert it.out == OK
        it.wire.feed(ASK[cut:] + ASK)
        await it.answer()
        await it.answer()
        assert it.out == OK * 3
        assert len(it.engine.calls) == 4
        it.wire.feed(ASK)  # the short way again
        await it.answer()
        assert it.out == OK * 4
        assert it.wire.state.total_requests == 5

    held(site, test)


def test_what_cannot_be_understood_is_answered_behind_it(site: Site) -> None:
    async def test(it: Held) -> None:
        it.wire.feed(b"nonsense\r\n\r\n")
        await it.wire.settle()
        assert not it.out
        await it.answer()
        assert it.out.startswith(OK + b"HTTP/1.1 400 ")
        assert it.wire.transport.is_closing()

    held(site, test)


@pytest.mark.parametrize("leave", ["end", "reset"])
def test_a_client_that_leaves_meanwhile_ends_it(site: Site, leave: str) -> None:
    async def test(it: Held) -> None:
        getattr(it.wire.transport, leave)()
        assert it.engine.last.cancelled
        await it.wire.settle()
        assert not it.out

    held(site, test)


def test_a_stop_meanwhile_makes_it_the_last(site: Site) -> None:
    async def test(it: Held) -> None:
        it.wire.connection.shutdown()
        assert not it.wire.transport.is_closing()
        await it.answer()
        assert it.out == OK_LAST
        assert it.wire.transport.is_closing()

    held(site, test)


def test_nothing_goes_the_short_way_after_a_stop(site: Site) -> None:
    async def test(it: Held) -> None:
        await it.answer()
        it.wire.connection.shutdown()
        it.wire.feed(ASK)
        await it.answer()
        assert it.out == OK + OK_LAST

    held(site, test)


def test_a_client_that_does_not_read_pauses_its_engine(site: Site) -> None:
    async def test(it: Held) -> None:
        client(it.wire).pause_writing()
        assert it.engine.last.paused
        client(it.wire).resume_writing()
        assert not it.engine.last.paused
        client(it.wire).pause_writing()
        it.wire.feed(ASK[:40])  # now it is the connection's
        client(it.wire).resume_writing()
        assert not it.engine.last.paused
        client(it.wire).pause_writing()
        await it.answer()
        it.wire.feed(ASK[40:])
        assert it.engine.last.paused
        client(it.wire).resume_writing()
        assert not it.engine.last.paused
        await it.answer()
        assert it.out == OK * 2

    held(site, test)


def test_a_body_that_is_too_large_goes_the_long_way(site: Site) -> None:
    async def test(it: Held) -> None:
        await it.answer()
        head, body = ASK.split(b"\r\n\r\n")
        size = site.inference.limit + 1
        it.wire.feed(head.replace(b"length: %d" % len(body), b"length: %d" % size) + b"\r\n\r\n" + b" " * size)
        await it.wire.settle()
        assert b" 413 " in it.out
        assert len(it.engine.calls) == 2
        assert site.frontend.counters.totals[TotalColumn.REJECTED] == 1

    held(site, test)


def test_a_lost_connection_holds_nothing(site: Site) -> None:
    """Nor does it wait for the collector of cycles, which seldom runs."""

    async def run() -> None:
        it = Held(site)
        await it.begin()
        await it.answer()
        gone = weakref.ref(it.wire.connection)
        it.wire.close()
        await it.wire.settle()
        gc.disable()
        try:
            it.engine.calls.clear()
            assert not site.frontend.time.pending  # which forgets the timers that were cancelled
            del it.wire.transport.protocol  # asyncio's and uvloop's forget it, too
            del it.wire
            assert gone() is None
        finally:
            gc.enable()

    asyncio.run(run())
