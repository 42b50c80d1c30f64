"""Counting, and saying a thing once per peer."""

from __future__ import annotations

import logging

import pytest

from broker.scheduler import tally
from broker.scheduler.tally import Tally
from broker.table import SchedulerEvent


def test_a_peer_is_named_once_and_counted_always(caplog: pytest.LogCaptureFixture) -> None:
    counts = Tally()
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            counts.dropped("engines.sock", b"\x01", "why")
        counts.dropped("engines.sock", b"\x02", "why")
    assert counts[SchedulerEvent.FRAMES_DROPPED] == 6
    assert [record.getMessage()[:50] for record in caplog.records] == [
        "engines.sock: dropped a message of peer 01: why (s",
        "engines.sock: dropped a message of peer 02: why (s",
    ]


def test_the_peers_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "MOST_PEERS", 2)
    counts = Tally()
    assert [counts.first(peer) for peer in "abca"] == [True, True, False, False]


def test_the_cells_may_be_shared_memory() -> None:
    cells = memoryview(bytearray(8 * len(SchedulerEvent))).cast("q")
    Tally(cells).add(SchedulerEvent.POLLS_FAILED, 3)
    assert cells[SchedulerEvent.POLLS_FAILED] == 3
