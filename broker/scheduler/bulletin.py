"""What is told of the fleet from time to time: who runs how much, and what became of those that left.

Only for faces that have lines for it; with any other a turn is one comparison.
"""

from __future__ import annotations

from broker.config import Scheduler
from broker.counters import CountersReader, TotalColumn
from broker.faces import Event
from broker.narrator import Narrator
from broker.scheduler.registry import SECOND_NS, Member, Registry
from broker.types import Role


class Bulletin:
    """Owned by the scheduler's loop."""

    def __init__(
        self, registry: Registry, counters: CountersReader, narrator: Narrator, settings: Scheduler, now_ns: int
    ) -> None:
        self._registry = registry
        self._counters = counters
        self._narrator = narrator
        self._stats_ns = int(settings.stats_interval_secs * SECOND_NS)
        self._sweep_ns = int(settings.eviction_interval_secs * SECOND_NS)
        self._next_stats_ns = now_ns + self._stats_ns
        self._next_sweep_ns = now_ns + self._sweep_ns
        self._choices = self._repeats = 0
        self._departed: dict[int, str] = {}  # slot -> URL of those that left requests behind

    def turn(self, now_ns: int) -> None:
        """Called several times a second."""
        if now_ns >= self._next_stats_ns:
            self._next_stats_ns = now_ns + self._stats_ns
            if self._narrator.tells(Event.STATS):
                self._stats()
            if self._narrator.tells(Event.FLEET):
                self._fleet()
        if now_ns >= self._next_sweep_ns:
            self._next_sweep_ns = now_ns + self._sweep_ns
            self._sweep()

    def removed(self, member: Member) -> None:
        """The instance is no member any more; its counters rest until its last request has ended."""
        if not self._narrator.tells(Event.CLEANED):
            return
        url = member.instance.url
        requests, tokens = self._counters.in_flight(member.slot)
        for what, unit, count in (("counter", "count", requests), ("token counter", "tokens", tokens)):
            event = Event.PRESERVED if count else Event.CLEANED
            self._narrator.tell(event, url=url, what=what, unit=unit, count=count)
        if requests:
            self._departed[member.slot] = url

    def _stats(self) -> None:
        running = {m.instance.url: self._counters.in_flight(m.slot)[0] for m in self._registry}
        totals = self._counters.totals()
        choices, repeats = int(totals[TotalColumn.SESSION_CHOICES]), int(totals[TotalColumn.SESSION_REPEATS])
        total, hits = choices - self._choices, repeats - self._repeats
        self._choices, self._repeats = choices, repeats
        self._narrator.tell(
            Event.STATS,
            running=sum(running.values()),
            workers=_listed([f"{url}: running={count}" for url, count in sorted(running.items())], ", "),
            rate=100 * hits / total if total else 0.0,
            hits=hits,
            total=total,
        )

    def _fleet(self) -> None:
        urls: dict[Role, list[str]] = {role: [] for role in Role}
        for member in self._registry:
            urls[member.instance.role].append(member.instance.url)
        found = {role.name.lower(): _listed(sorted(urls[role]), " ") for role in Role}
        self._narrator.tell(Event.FLEET, **found)

    def _sweep(self) -> None:
        left = {slot: url for slot, url in self._departed.items() if self._counters.in_flight(slot)[0]}
        gone = [url for slot, url in self._departed.items() if slot not in left]
        self._departed = left
        if gone:
            self._narrator.tell(Event.CLEANED_ALL, count=len(gone), urls=_listed(gone, " "))
        if left:
            self._narrator.tell(Event.PRESERVED_ALL, count=len(left), urls=_listed(list(left.values()), " "))


def _listed(items: list[str], separator: str) -> str:
    return f"[{separator.join(items)}]"
