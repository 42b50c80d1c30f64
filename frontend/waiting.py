"""What a request and the line that it may have to stand in say to each other."""

from __future__ import annotations

from typing import Protocol

from broker.errors import PenstockError
from broker.route import RouteRequest
from frontend.dispatch import Chosen, Considered
from frontend.upstream.base import Headers


class Waiter(Protocol):
    """Who waits. One of the two is called, once, unless it leaves before."""

    def granted(self, choice: Chosen, waited_s: float, home: str) -> None:
        """Send the request there; the lease is yours. `home`: the instance in whose line it stood, by URL."""

    def refused(self, error: PenstockError) -> None:
        """It ends here."""


class Place(Protocol):
    """A place in line."""

    def leave(self) -> None:
        """Give it up, if it is still held. Idempotent."""


class Line(Protocol):
    """Where requests stand; `frontend.admission.Admission` is the real one."""

    def wait(
        self, route: RouteRequest, headers: Headers, home: int, waiter: Waiter, since_ns: int | None = None
    ) -> Place:
        """Stand in the line of the instance in slot `home`, as one who came at `since_ns` (monotonic; None: now).

        The waiter is never called before this returns.
        """


class Saturated(PenstockError):
    """Every candidate has as many requests as it should: no failure, the request may stand in `line`."""

    status = 503
    kind = "service_unavailable"
    code = "saturated"
    retry_after_s = 1

    def __init__(self, line: Line, home: int, considered: Considered | None = None) -> None:
        """`home`: the slot that the policy prefers, having considered that."""
        super().__init__("every instance is saturated")
        self.line = line
        self.home = home
        self.considered = considered
