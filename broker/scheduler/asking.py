"""Questions to every frontend: asked at once, answered in parts, and never waited for longer than a second.

scheduler --EndRequests, TellDecisions (ask)--> every frontend
          <-----Ended, Decided (ask, more)-----

The roster in shared memory says who lives, hellos say how to reach them. A frontend serves from its first moment and
says hello some moments later, to a new scheduler too: a question meanwhile waits for that hello, as it may be this
frontend that has the request.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable

from broker import wire

FRONTENDS_S = 1.0

Question = wire.EndRequests | wire.TellDecisions
Part = wire.Ended | wire.Decided
Tell = Callable[[bytes, Question], bool]
"""Sends to a frontend; False = it is gone, or takes no more for the moment."""
Who = tuple[int, int]
"""A frontend's row, and its life in that row."""


class _Asked:
    """One question to all frontends."""

    def __init__(self, question: Question, awaited: set[Who]) -> None:
        self.question = question
        self.awaited = awaited  # they have not said hello yet
        self.open: set[bytes] = set()  # they have been asked
        self.parts: list[Part] = []
        self.done = asyncio.Event()

    def look(self) -> None:
        if not self.open and not self.awaited:
            self.done.set()


class Asking:
    """Owner of the list of frontends, and of the questions under way."""

    def __init__(self, tell: Tell, lives: Callable[[], Iterable[Who]]) -> None:
        """`lives`: the frontends in the roster."""
        self._tell = tell
        self._lives = lives
        self._frontends: dict[int, tuple[Who, bytes]] = {}  # by row: a life ends that of its predecessor
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}

    def enter(self, who: Who, peer: bytes) -> None:
        """A frontend said hello."""
        self._frontends[who[0]] = who, peer
        for asked in self._asked.values():
            if who in asked.awaited:
                asked.awaited.discard(who)
                self._put(asked, peer)
                asked.look()

    def heard(self, peer: bytes, part: Part) -> None:
        asked = self._asked.get(part.ask)
        if asked is None or peer not in asked.open:
            return
        asked.parts.append(part)
        if not part.more:
            asked.open.discard(peer)
            asked.look()

    async def ask(self, question: Callable[[int], Question]) -> tuple[list[Part], int]:
        """What they answered, and how many were silent. `question` gets its number."""
        number = next(self._numbers)
        known, lives = list(self._frontends.values()), set(self._lives())
        asked = self._asked[number] = _Asked(question(number), lives - {who for who, _ in known})
        try:
            for who, peer in known:
                if not self._put(asked, peer) and who not in lives:
                    del self._frontends[who[0]]
            asked.look()
            async with asyncio.timeout(FRONTENDS_S):
                await asked.done.wait()
        except TimeoutError:
            pass
        finally:
            del self._asked[number]
        return asked.parts, len(asked.open) + len(asked.awaited)

    def _put(self, asked: _Asked, peer: bytes) -> bool:
        """False = it is gone, and with it what it had, or takes no more for the moment."""
        if not self._tell(peer, asked.question):
            return False
        asked.open.add(peer)
        return True
