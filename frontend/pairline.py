"""A request for a pair that finds no room: it stands in the line of one of its legs, and holds nothing meanwhile.

                     every prefill is full                       every decode that fits is full
    choose ---------------------------------> PREFILL's line  <-------------------------------- a prefill, given back
       |                                          | granted                                          ^
       |                                          v                                                  |
       |                                   a prefill, and a decode is chosen for it -----------------+
       |                                          | it has room
       |                                          +------------------------------> both: the request is sent
       +--- every decode that fits is full ---> DECODE's line, likewise with prefill and decode exchanged

A granted leg is kept only if its partner has room at that moment; else it is given back at once to the next in line,
and the request stands in the partner's line, as old as it is. So no place is ever held for one that waits for another
place. After `TURNS` such turns the partner is taken full: then the request waits inside an engine.
"""

from __future__ import annotations

import time
from typing import Protocol

from broker.errors import PenstockError
from broker.route import RouteRequest
from broker.types import Role
from frontend.dispatch import Choice, Chosen
from frontend.upstream.base import Headers
from frontend.waiting import Line, Place, Saturated, Waiter

TURNS = 4
"""Two full rounds."""


class Maker(Protocol):
    """Who makes pairs; `frontend.pair.Pairer` is the real one."""

    @property
    def line(self) -> Line:
        """Of single legs."""

    def asked(self, request: RouteRequest, role: Role) -> RouteRequest:
        """What is asked of a leg."""

    def complete(self, request: RouteRequest, leg: Choice, now: float, *, full: bool) -> Chosen:
        """A pair with that leg, which is given back if there is none: raises `PenstockError`, `NoRoom` among them.
        `full`: its partner need not have room."""


class LegLine:
    """The line of one role, for requests that need a pair."""

    def __init__(self, pairs: Maker, role: Role) -> None:
        self._pairs = pairs
        self.role = role

    def wait(
        self, route: RouteRequest, headers: Headers, home: int, waiter: Waiter, since_ns: int | None = None
    ) -> Place:
        return _Standing(self._pairs, self.role, route, headers, home, waiter, since_ns)


class NoRoom(Saturated):
    """No leg of a role has room."""

    def __init__(self, line: LegLine, full: Saturated) -> None:
        super().__init__(line, full.home, full.considered)
        self.role = line.role


class _Standing:
    """One request: the waiter of its leg's line, and the place of whoever waits for the pair."""

    __slots__ = ("_headers", "_pairs", "_place", "_route", "_since_ns", "_turns", "_waiter")

    def __init__(
        self,
        pairs: Maker,
        role: Role,
        route: RouteRequest,
        headers: Headers,
        home: int,
        waiter: Waiter,
        since_ns: int | None,
    ) -> None:
        self._pairs = pairs
        self._route = route
        self._headers = headers
        self._waiter = waiter
        self._since_ns = time.monotonic_ns() if since_ns is None else since_ns
        self._turns = 0
        self._place = self._stand(role, home)

    def _stand(self, role: Role, home: int) -> Place:
        # With a time of its own it is not lent to other hosts: a pair is of one host.
        asked = self._pairs.asked(self._route, role)
        return self._pairs.line.wait(asked, self._headers, home, self, self._since_ns)

    def leave(self) -> None:
        self._place.leave()

    def granted(self, choice: Chosen, waited_s: float, home: str) -> None:
        (leg,) = choice.legs
        try:
            pair = self._pairs.complete(self._route, leg, time.monotonic(), full=self._turns >= TURNS)
        except NoRoom as full:
            self._turns += 1
            self._place = self._stand(full.role, full.home)
        except PenstockError as error:
            self._waiter.refused(error)
        else:
            stolen = home != leg.instance.url
            self._waiter.granted(pair, waited_s, home if stolen else pair.instance.url)

    def refused(self, error: PenstockError) -> None:
        self._waiter.refused(error)
