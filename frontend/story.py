"""What is told of one request while it is on its way, for faces that tell more than its end.

Facts that cost something, such as the counts of an instance, are gathered only for lines that are written.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence

import numpy as np

from broker.errors import NoInstance, PenstockError, UpstreamError
from broker.faces import Event, Face
from broker.faces.go import duration
from broker.lease import Lease
from broker.narrator import Narrator, printable
from broker.policies.base import Vector, Why
from broker.types import Role
from broker.view import TableReader
from frontend.dispatch import Choice, Chosen

_CHOSEN = {Role.MIXED: Event.CHOSEN_MIXED, Role.PREFILL: Event.CHOSEN_PREFILL, Role.DECODE: Event.CHOSEN_DECODE}


class Stories:
    """What all stories of a frontend share."""

    def __init__(self, face: Face, table: TableReader) -> None:
        self.narrator = Narrator(face, "frontend")
        self.counters = table.counters
        self._table = table

    @classmethod
    def of(cls, face: Face, table: TableReader) -> Stories | None:
        """None for a face that has nothing to tell before a request's end."""
        return cls(face, table) if Event.PARSED in face.lines else None

    def listed(self, slots: Vector, values: Sequence[int] | Vector) -> str:
        """As Go prints a map of URLs."""
        urls = [self.url(slot) for slot in slots.tolist()]
        found = sorted(zip(urls, np.asarray(values).tolist(), strict=True))
        return f"map[{' '.join(f'{url}:{value}' for url, value in found)}]"

    def url(self, slot: int) -> str:
        return self._table.instance(slot).url

    def begin(self, method: str, path: str, client: str, tags: Iterable[tuple[str, str]] = ()) -> Story:
        """`tags`: name and value of what the request is called by others; empty values are left out."""
        context = "".join(f"[{name}:{printable(value)}] " for name, value in tags if value)
        # An IPv4 client of a socket for both families.
        return Story(self, method, printable(path), client.removeprefix("::ffff:"), context)


class Story:
    """Of one request; told by whoever moves it."""

    __slots__ = (
        "_client",
        "_context",
        "_counters",
        "_failed",
        "_method",
        "_narrator",
        "_path",
        "_stories",
        "_stream",
    )

    def __init__(self, stories: Stories, method: str, path: str, client: str, context: str) -> None:
        self._stories = stories
        self._narrator = stories.narrator
        self._counters = stories.counters
        self._method = method
        self._path = path
        self._client = client
        self._stream = False
        self._failed: set[Lease] = set()  # of the last attempt, if it failed
        self._context = context

    def parsed(self, *, stream: bool) -> None:
        self._stream = stream
        self._tell(Event.PARSED)

    def refused(self, error: PenstockError) -> None:
        """Nothing of it is forwarded."""
        self._tell(Event.UNREAD, error=error.message)

    def chosen(self, legs: tuple[Choice, ...]) -> None:
        paired = len(legs) > 1
        for leg in legs:
            self._follow(leg, legs)
            if paired:
                prefill = leg.instance.role is Role.PREFILL
                self._tell(Event.CHOOSING_PREFILL if prefill else Event.CHOOSING_DECODE, now=_now())
            if leg.considered is not None and leg.considered.why is not None:
                self._weighed(leg.considered.view.slots, leg.considered.why, leg.lease.slot)
            event = _CHOSEN[leg.instance.role]
            if self._narrator.tells(event):
                count, tokens = self._counters.in_flight(leg.lease.slot)
                self._tell(event, url=leg.instance.url, count=count, tokens=tokens)
        if paired:
            self._tell(Event.CHOSEN_PAIR, now=_now())

    def failed(self, error: PenstockError, *, paired: bool, began: bool) -> None:
        """The request ends with this error; `began`: within its answer."""
        if began:
            self._tell(Event.BROKEN, error=error.message)
        elif isinstance(error, NoInstance):
            what = "worker pair" if paired else "mixed worker"
            self._tell(Event.NOT_CHOSEN, error="no healthy workers available", what=what)
        elif isinstance(error, UpstreamError):
            self._tell(Event.UNREACHABLE, error=error.message)

    def attempt_failed(self, attempt: int, attempts: int, choice: Chosen, error: str) -> None:
        if len(choice.legs) == 1:
            self._tell(Event.ATTEMPT_FAILED, attempt=attempt, attempts=attempts, error=error)
            self._tell(Event.BACKEND_FAILED, url=choice.where, error=error)
            return
        self._failed = {leg.lease for leg in choice.legs}
        for leg in choice.legs:
            if leg.lease in choice.suspects:
                prefill = leg.instance.role is Role.PREFILL
                event = Event.PREFILL_FAILED if prefill else Event.DECODE_FAILED
                self._tell(event, url=leg.instance.url, error=error)

    def _weighed(self, slots: Vector, why: Why, slot: int) -> None:
        stories, now = self._stories, _now()
        if why.loads is None or not self._narrator.tells(Event.WEIGHED):
            return
        loads = stories.listed(slots, why.loads)
        if why.hits is None:
            loads = f", loads={loads}" if why.reason.startswith("load") else ""
            self._tell(Event.NOT_WEIGHED, reason=why.reason, loads=loads, now=now)
            return
        if self._narrator.tells(Event.SCORED):
            most = max(int(max(why.loads)), 1)
            for its, hit, load, score in zip(slots, why.hits, why.loads, why.scores, strict=True):
                self._tell(Event.SCORED, url=stories.url(int(its)), hit=hit, load=load / most, score=score)
        percentages = np.asarray(why.hits)
        met = percentages > 0
        hits = stories.listed(slots[met], percentages[met])
        self._tell(Event.WEIGHED, url=stories.url(slot), loads=loads, hits=hits, now=now)

    def _follow(self, leg: Choice, legs: tuple[Choice, ...]) -> None:
        """Tells of the lease's end. It may come when the next attempt, even at the same instance, has its leases."""
        lease = leg.lease
        earlier, tokens = lease.on_close, lease.tokens

        def closed(slot: int) -> None:
            if earlier is not None:
                earlier(slot)
            self._released(leg, tokens, alone=all(other is leg or other.lease.closed for other in legs))

        lease.on_close = closed

    def _released(self, leg: Choice, tokens: int, *, alone: bool) -> None:
        """`alone`: no other lease of the attempt is open."""
        url = leg.instance.url
        if leg.instance.role is Role.PREFILL:
            if leg.lease in self._failed:
                self._tell(Event.PREFILL_DROPPED, url=url)
            elif alone:  # decode's is closed, so this comes with the attempt's end
                self._tell(Event.PREFILL_ENDED, url=url, stream=str(self._stream).lower())
            else:
                self._tell(Event.PREFILL_DONE if self._stream else Event.PREFILL_READ, url=url)
        if self._narrator.tells(Event.RELEASED):
            count, left = self._counters.in_flight(leg.lease.slot)
            self._tell(Event.RELEASED, url=url, count=count)
            if tokens:
                self._tell(Event.TOKENS_RELEASED, url=url, tokens=left)

    def ended(self, status: int, seconds: float, *, completed: bool, left: bool = False) -> None:
        """`completed`: an answer had begun. `left`: the client did, before its end."""
        if completed and left:
            self._tell(Event.BROKEN, error="context canceled")
        if completed:
            self._tell(Event.COMPLETED)
        self._tell(
            Event.ANSWERED,
            method=self._method,
            path=self._path,
            status=status,
            duration=duration(seconds),
            client=self._client,
        )

    def _tell(self, event: Event, **facts: object) -> None:
        self._narrator.tell(event, context=self._context, **facts)


def _now() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
