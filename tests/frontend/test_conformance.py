"""The table of `conformance.py`, on both paths and with heads that are known, in one read and byte by byte; and inputs
that were never thought of."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
from collections.abc import Iterator

import pytest
from uvicorn.server import ServerState

from frontend.lean import Lean
from tests.frontend.conformance import GOOD, ROWS, Row, short
from tests.frontend.site import Site
from tests.frontend.wire import PATHS, Path

INPUTS = int(os.environ.get("FUZZ_INPUTS", "1500"))
"""That are compared between the paths."""


READ = 16 * 1024
"""What one read brings at most."""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Lean]]:
    """A frontend that has seen every row before."""
    site = Site(tmp_path_factory.mktemp("site"))
    lean = Lean(site.inference, ServerState())

    async def run() -> None:
        for row in ROWS:
            await exchange(site, "lean", row.nameless.sent, [], lean)

    asyncio.run(run())
    yield site, lean
    site.frontend.close()


def cuts_of(sent: bytes, how: str) -> list[list[int]]:
    """The ways in which the bytes are cut into reads."""
    reads = list(range(READ, len(sent), READ))
    if how == "whole" or len(sent) > READ:  # the long ones byte by byte would only be slow
        return [reads]
    if how == "by requests":
        return [[found.start() for found in re.finditer(rb"(?:POST|GET) /", sent)][1:]]
    return [list(range(1, len(sent)))] if how == "byte by byte" else [[at] for at in range(7, len(sent), 31)]


@pytest.mark.parametrize("how", ["whole", "byte by byte", "in two"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(site: Site, row: Row, path: Path, how: str) -> None:
    async def run() -> None:
        for cuts in cuts_of(row.sent, how):
            out, is_closing, bodies = await exchange(site, path, row.sent, cuts)
            assert (short(out), "closed" if is_closing else "open", tuple(bodies)) == row[2:], cuts

    asyncio.run(run())


@pytest.mark.parametrize("how", ["whole", "by requests", "in two"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_that_comes_again(warm: tuple[Site, Lean], row: Row, how: str) -> None:
    site, lean = warm
    row = row.nameless

    async def run() -> None:
        for cuts in cuts_of(row.sent, how):
            out, is_closing, bodies = await exchange(site, "lean", row.sent, cuts, lean)
            assert (named(out), "closed" if is_closing else "open", tuple(bodies)) == row[2:], cuts

    asyncio.run(run())


def test_what_is_known_are_single_good_requests(warm: tuple[Site, Lean]) -> None:
    known = [row for row in ROWS if warm[1].known.whole(row.nameless.sent) is not None]
    assert all(row.forwarded == (b"{}",) for row in known)
    assert {row.name for row in known} == {
        "length",
        "leading zeros of a length",
        "bytes above ASCII in a value",
        "an empty host",
        "Connection: keep-alive",
        "Connection: close",
        "close among other words",
        "HTTP/1.0",
        "HTTP/1.0 is not kept alive",
    }


def mutated(rng: random.Random) -> bytes:
    """One or two rows of the table, with a few bytes changed, dropped, doubled or moved."""
    data = bytearray(b"".join(rng.choice(SHORT).sent for _ in range(rng.randint(1, 2))))
    for _ in range(rng.randint(0, 4)):
        if not data:
            break
        at = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 16)]
            case 3:
                data[at:at] = rng.choice(WORDS)
            case 4:
                data[at] = rng.choice(b"\r\n \t:;,0")
            case 5:
                del data[at:]
    return bytes(data)


def named(out: bytes) -> bytes:
    """Without the names that requests were given."""
    return re.sub(rb"x-request-id: [0-9a-f]{24}\r", b"x-request-id: made\r", short(out))


SHORT = [form for row in ROWS if len(row.sent) < 1000 for form in (row, row.nameless)]
WORDS = [
    b"\r\n",
    b"\n",
    b"\r\n\r\n",
    b"0\r\n\r\n",
    b"transfer-encoding: chunked\r\n",
    b"content-length: 2\r\n",
    b"{}",
    b" ",
]


async def exchange(
    site: Site, path: Path, data: bytes, cuts: list[int], lean: Lean | None = None
) -> tuple[bytes, bool, list[bytes]]:
    """What an input brings about on one path; afterwards nothing of it is left."""
    site.engine.bodies.clear()
    wire = site.connect(path, lean)
    start = 0
    for cut in (*cuts, len(data)):
        wire.feed(data[start:cut])
        start = cut
        if len(cuts) < 3:
            await wire.settle()
    for _ in range(3):
        await wire.settle()
    assert wire.transport.reads
    found = wire.out, wire.transport.is_closing(), list(site.engine.bodies)
    wire.transport.end()
    await wire.settle()
    assert wire.transport.lost, data
    assert site.is_idle, data
    assert not wire.state.tasks, data
    assert not wire.state.connections, data
    return found


def test_any_input_means_the_same_on_both_paths_and_leaves_nothing(site: Site) -> None:
    rng = random.Random(4)
    known = Lean(site.inference, ServerState())

    async def run() -> None:
        for _ in range(INPUTS):
            data = mutated(rng)
            cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randint(0, 2)))
            lean, plain = [await exchange(site, path, data, cuts) for path in PATHS]
            again = await exchange(site, "lean", data, cuts, known)
            if b"expect" in data.lower():
                continue  # whether 100 is said depends on what has been read by then, not on the input alone
            for found in (lean, again):
                assert (named(found[0]), *found[1:]) == (named(plain[0]), *plain[1:]), (data, cuts)

    asyncio.run(run())


BATCH = 50


@pytest.mark.parametrize("inputs", [2000, pytest.param(1_000_000, marks=pytest.mark.stress)])
def test_no_input_crashes_or_stalls_the_lean_path(site: Site, inputs: int, caplog: pytest.LogCaptureFixture) -> None:
    """Connections in batches, which share the turns that they are given. Each input is followed by a request that is
    good: it is answered, or the connection has been ended with a word, or waits for what the input announced."""
    rng = random.Random(5)

    async def run() -> None:
        for _ in range(inputs // BATCH):
            wires = []
            for _ in range(BATCH):
                wire = site.connect("lean")
                data = mutated(rng)
                cut = rng.randrange(len(data) + 1)
                wire.feed(data[:cut])
                wire.feed(data[cut:] + GOOD)
                wires.append((wire, data))
            for _ in range(2):
                await wires[0][0].settle()
            site.engine.bodies.clear()
            for wire, data in wires:
                assert wire.transport.reads, data
                assert not wire.transport.is_closing() or wire.out, data
                wire.transport.end()
            await wires[0][0].settle()
            assert site.is_idle, [data for _, data in wires]
            assert all(wire.transport.lost and not wire.state.connections for wire, _ in wires)
            for wire, _ in wires:
                wire.idle.close()

    caplog.set_level(logging.ERROR)
    asyncio.run(run())
    assert not caplog.records
