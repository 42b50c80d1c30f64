"""What a frontend keeps of its decisions, so that it can tell why a request went where it went.

    Choice.considered    the view as the policy saw it, and what the policy made of it     references, nothing is copied
    steps                what happened to one request, in order                            one small object each
    Decisions            the last requests, and apart from them the last notable ones

All of it is read when somebody asks (`frontend.explain`), and not before. What keeping costs each request, and what it
would cost to write it all down at once, is in benchmarks/test_decisions.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet

import msgspec

from frontend.account import Outcome
from frontend.dispatch import Chosen, Considered


class Sent(msgspec.Struct, frozen=True, gc=False):
    """To an instance, or a pair of them."""

    at: float
    chosen: Chosen


class Queued(msgspec.Struct, frozen=True, gc=False):
    """No candidate had room; it stands in the line of the slot that the policy preferred."""

    at: float
    home: int
    considered: Considered | None


class Granted(msgspec.Struct, frozen=True, gc=False):
    """It leaves the line for an instance, which may be another one than it stood for."""

    at: float
    waited_s: float
    home: str


class Failed(msgspec.Struct, frozen=True, gc=False):
    """An attempt, or with the last one the request. `where` is `-` if it was nowhere."""

    at: float
    where: str
    reason: str


class Rescued(msgspec.Struct, frozen=True, gc=False):
    """Taken back from an instance, in which it waited, for one with nothing to do."""

    at: float
    where: str


Step = Sent | Queued | Granted | Failed | Rescued


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One request, as far as it has come. Neither prompt nor answer is in it."""

    ident: bytes
    name: str
    """Another id that the client may know it by; empty: it has none."""
    path: str
    """With its query; `cut`."""
    model: str | None
    began: float
    """By the clock of the steps."""
    steps: list[Step]
    status: int
    outcome: Outcome | None
    """None: it is under way."""
    first_byte_s: float | None
    duration_s: float


MOST_PATH = 256
"""Characters of a path, or of its query, that are kept; a target may be as long as a head."""
CUT = "…"


def cut(path: str) -> str:
    """What is kept of a path that is too long."""
    return path[:MOST_PATH] + CUT


Smooth = tuple[bytes, str, str, str | None, float, Chosen, int, float | None, float]
"""A request that was sent once and answered: ident, name, path, model, when it began and where it went; status, time to
the first byte, duration. Nearly all are, and this costs a quarter of a `Record` and its steps."""


class Decisions:
    """The last requests of a frontend. What was out of the ordinary (it waited, was moved, failed, or its client asked
    why) has a place of its own, so that a flood of smooth ones does not wash it away."""

    def __init__(self, most: int) -> None:
        """`most` of each kind."""
        self._smooth: deque[Smooth] = deque(maxlen=most)
        self._notable: deque[Record] = deque(maxlen=most)
        self.smooth: Callable[[Smooth], None] = self._smooth.append
        """Keeps one that has ended; as `notable`."""
        self.notable: Callable[[Record], None] = self._notable.append

    def __len__(self) -> int:
        return len(self._smooth) + len(self._notable)

    def find(self, names: AbstractSet[str]) -> Iterator[Record]:
        """Those that go by one of these names, the last one of each kind first."""
        for record in reversed(self._notable):
            if record.name in names or record.ident.decode("ascii") in names:
                yield record
        for smooth in reversed(self._smooth):
            if smooth[1] in names or smooth[0].decode("ascii") in names:
                yield _record(*smooth)


def _record(
    ident: bytes,
    name: str,
    path: str,
    model: str | None,
    began: float,
    chosen: Chosen,
    status: int,
    first_byte_s: float | None,
    duration_s: float,
) -> Record:
    return Record(
        ident=ident,
        name=name,
        path=path,
        model=model,
        began=began,
        steps=[Sent(began, chosen)],
        status=status,
        outcome=Outcome.DONE,
        first_byte_s=first_byte_s,
        duration_s=duration_s,
    )
