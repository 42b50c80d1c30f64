"""What is told of the fleet from time to time, in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from broker import config
from broker.counters import CountersReader, TotalColumn, attach_counters
from broker.faces import FD_ROUTER, PENSTOCK, Face
from broker.lease import Lease, take
from broker.narrator import Narrator
from broker.scheduler.bulletin import Bulletin
from broker.scheduler.registry import Member, Registry
from broker.table_writer import TableWriter
from broker.types import Instance
from tests.support.table import Run

SETTINGS = config.build({"scheduler": {"stats-interval-secs": 5, "eviction-interval-secs": 60}}).scheduler


class News:
    """A registry over a real table, a frontend's counters, and what was told."""

    def __init__(self, run: Run, told: pytest.LogCaptureFixture, face: Face = FD_ROUTER) -> None:
        told.set_level("DEBUG", logger="scheduler")
        self.run = run
        self.counters = run.frontend(0)
        self.segment = attach_counters(run.path, run.config)
        run.writer.close()
        run.writer = TableWriter.attach(run.path, run.config)  # which the registry takes over
        self.registry = Registry(run.writer, config.build({}), run.clock())
        reader = CountersReader(self.segment)
        self.bulletin = Bulletin(self.registry, reader, Narrator(face, "scheduler"), SETTINGS, run.clock())
        self._told = told

    def add(self, url: str) -> Member:
        return self.registry.register(Instance(url=url), self.run.clock())

    def take(self, member: Member, tokens: int = 0) -> Lease:
        entry = next(entry for entry in self.run.reader.entries() if entry.slot == member.slot)
        lease = take(self.run.reader, self.counters, entry.slot, entry.generation, tokens)
        assert lease is not None
        return lease

    def after(self, seconds: float) -> list[str]:
        """What is told when so much time has passed."""
        self._told.clear()
        self.bulletin.turn(self.run.clock.advance(seconds))
        return list(self._told.messages)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with Run(tmp_path) as run:
        yield run


@pytest.fixture
def news(run: Run, caplog: pytest.LogCaptureFixture) -> Iterator[News]:
    news = News(run, caplog)
    yield news
    news.segment.close()


def test_statistics_are_told_every_interval_also_of_nobody(news: News) -> None:
    assert news.after(4.9) == []
    assert news.after(0.1)[0] == "[stats] total_running=0, workers: [], cache_hit_rate=0.00% (hits=0/total=0)"
    assert news.after(4.9) == []
    assert len(news.after(0.1)) == 2


def test_hits_are_those_of_the_interval(news: News) -> None:
    a, b = news.add("http://b:1"), news.add("http://a:1")
    news.take(a)
    news.take(a)
    news.counters.count(TotalColumn.SESSION_CHOICES)
    news.counters.count(TotalColumn.SESSION_CHOICES)
    news.counters.count(TotalColumn.SESSION_CHOICES)
    news.counters.count(TotalColumn.SESSION_REPEATS)
    told = news.after(5)
    assert told == [
        "[stats] total_running=2, workers: [http://a:1: running=0, http://b:1: running=2], "
        "cache_hit_rate=33.33% (hits=1/total=3)",
        "Healthy instances: prefill=[], decode=[], mixed=[http://a:1 http://b:1]",
    ]
    assert "hits=0/total=0" in news.after(5)[0]
    assert b.healthy


def test_counters_of_who_left_are_told_until_its_last_request_has_ended(
    news: News, caplog: pytest.LogCaptureFixture
) -> None:
    idle, busy = news.add("http://a:1"), news.add("http://b:1")
    lease = news.take(busy, 7)
    caplog.clear()
    for member in (idle, busy):
        news.registry.leave(member.instance.url, news.run.clock())
        news.bulletin.removed(member)
    assert caplog.messages == [
        "cleanup unhealthy worker counter: http://a:1",
        "cleanup unhealthy worker token counter: http://a:1",
        "unhealthy worker counter preserved (inflight requests): http://b:1, count: 1",
        "unhealthy worker token counter preserved (inflight requests): http://b:1, tokens: 7",
    ]
    assert news.after(60)[-1] == "preserved counters for 1 workers with inflight requests: [http://b:1]"
    lease.close()
    assert news.after(60)[-1] == "removed counters for 1 unhealthy workers: [http://b:1]"
    assert not any("counters for" in line for line in news.after(60))


def test_our_own_face_tells_nothing_of_it(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    news = News(run, caplog, PENSTOCK)
    news.add("http://a:1")
    assert news.after(61) == []
    news.segment.close()
