"""What a frontend tells the scheduler of its choices: soon, in few messages, and never by waiting."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from broker.counters import TotalColumn
from broker.prefix import PrefixIndex
from broker.prefix.index import BATCH_NOTICES
from broker.route import RouteRequest
from broker.wire import RoutingNotices
from frontend.notices import AT_ONCE, SEND_S, Notices
from tests.frontend.fakes import Frontend
from tests.support.prefix import Prefixes


class Bench:
    def __init__(self, path: Path) -> None:
        self.frontend = Frontend(path)
        self.time = self.frontend.time
        self.prefixes = Prefixes(path)
        self.index: PrefixIndex = self.prefixes.index
        self.sent: list[RoutingNotices] = []
        self.takes = True
        loop = cast("asyncio.AbstractEventLoop", self.time)
        self.notices = Notices(self.index, self.frontend.counters, self.send, loop)

    def send(self, notices: RoutingNotices) -> bool:
        if self.takes:
            self.sent.append(notices)
        return self.takes

    def note(self, text: str, slot: int = 3) -> None:
        self.index.note(RouteRequest(prompt=text), slot)

    @property
    def lost(self) -> int:
        return self.frontend.total(TotalColumn.NOTICES_LOST)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_what_a_few_milliseconds_bring_is_one_message(bench: Bench) -> None:
    assert bench.time.pending == 0
    for number in range(3):
        bench.note(f"{number} and a prompt")
    assert (bench.time.pending, bench.sent) == (1, [])
    bench.time.advance(SEND_S)
    assert [len(message.slots) for message in bench.sent] == [3]
    assert bench.time.pending == 0  # nothing to say, nothing to wake up for


def test_what_the_scheduler_does_not_take_is_lost_and_counted(bench: Bench) -> None:
    bench.takes = False
    bench.note("a prompt of some length")
    bench.time.advance(SEND_S)
    assert bench.lost == 1
    bench.takes = True
    bench.note("another prompt of some length")
    bench.time.advance(SEND_S)
    assert (len(bench.sent), bench.lost) == (1, 1)


def test_a_flood_is_told_in_turns(bench: Bench) -> None:
    for number in range(BATCH_NOTICES * AT_ONCE + 1):
        bench.note(f"{number} and a prompt")
    bench.time.advance(SEND_S)
    assert len(bench.sent) == AT_ONCE
    bench.time.advance(SEND_S)
    assert sum(len(message.slots) for message in bench.sent) == BATCH_NOTICES * AT_ONCE + 1
    assert bench.lost == 0


def test_after_the_end_nothing_is_told(bench: Bench) -> None:
    bench.note("a prompt of some length")
    bench.notices.close()
    bench.note("a prompt of some length")
    bench.time.advance(1)
    assert bench.sent == []
