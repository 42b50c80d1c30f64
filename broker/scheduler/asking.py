"""Questions to every frontend: asked at once, answered in parts, and never waited for longer than a second.

scheduler --EndRequests, TellDecisions (ask)--> every frontend
          <-----Ended, Decided (ask, more)-----
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from broker import wire

FRONTENDS_S = 1.0

Question = wire.EndRequests | wire.TellDecisions
Part = wire.Ended | wire.Decided
Tell = Callable[[bytes, Question], bool]
"""Sends to a frontend; False = it is gone."""


class _Asked:
    """One question to all frontends."""

    def __init__(self, peers: set[bytes]) -> None:
        self.open = peers
        self.parts: list[Part] = []
        self.done = asyncio.Event()


class Asking:
    """Owner of the list of frontends, and of the questions under way."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._frontends: set[bytes] = set()
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}

    def enter(self, peer: bytes) -> None:
        """A frontend said hello."""
        self._frontends.add(peer)

    def heard(self, peer: bytes, part: Part) -> None:
        asked = self._asked.get(part.ask)
        if asked is None or peer not in asked.open:
            return
        asked.parts.append(part)
        if not part.more:
            asked.open.discard(peer)
            if not asked.open:
                asked.done.set()

    async def ask(self, question: Callable[[int], Question]) -> tuple[list[Part], int]:
        """What they answered, and how many were silent. `question` gets its number."""
        number = next(self._numbers)
        asked = self._asked[number] = _Asked(set(self._frontends))
        try:
            for peer in list(asked.open):
                if not self._tell(peer, question(number)):
                    self._frontends.discard(peer)  # it says hello again if it lives
                    asked.open.discard(peer)
            if asked.open:
                async with asyncio.timeout(FRONTENDS_S):
                    await asked.done.wait()
        except TimeoutError:
            pass
        finally:
            del self._asked[number]
        return asked.parts, len(asked.open)
