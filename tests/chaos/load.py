"""Skewed load that never retries: so many requests are kept open, most of them at one host."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.support.client import Client, Exchange, State, chat

PATH = "/v1/chat/completions"
STAY_S = (0.0, 4.0)
"""How long those stay that leave."""
MEAN = 1.65
"""Of a log-normal variable with parameters 0 and 1."""
TWINS = 8
"""Names that requests share, at one host and at several."""


@dataclass(frozen=True)
class Habits:
    """What clients do besides asking and listening. Shares of the requests."""

    priorities: Sequence[str] = ("normal",)
    leave: float = 0.0
    """Go before the answer is whole."""
    twins: float = 0.0
    """Call their request by a name that others use at the same time."""


@dataclass(frozen=True)
class Asked:
    """One request, as its client knows it."""

    name: str
    """X-Request-Id: what the engine has it by."""
    priority: str
    body: Mapping[str, object]
    words: int


class Load:
    """`open` requests at any time, `share` of them at the first host. What ends is followed by the next one.

    The client of each host keeps its ledger; ids there say where a request was sent: `h0-17`.
    """

    def __init__(
        self,
        ports: Sequence[int],
        *,
        open: int,
        share: float,
        words: float,
        rng: random.Random,
        habits: Habits = Habits(),
        is_up: Callable[[int], bool] = lambda host: True,
    ) -> None:
        """`words`: mean length of an answer; lengths are log-normal. `is_up`: nothing is sent to hosts that are not."""
        self.clients = [Client(port) for port in ports]
        self.asked: dict[str, Asked] = {}
        """By the ledger's id."""
        self._open = open
        self._share = share
        self._words = words
        self._rng = rng
        self._habits = habits
        self._is_up = is_up
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    @property
    def exchanges(self) -> list[Exchange]:
        return [exchange for client in self.clients for exchange in client.ledger.values()]

    def streaming(self) -> int:
        """Streams under way: begun and not ended."""
        return sum(e.state is State.OPEN and e.first_byte_at > 0 for e in self.exchanges)

    def waiting(self) -> int:
        return sum(e.state is State.OPEN and not e.first_byte_at for e in self.exchanges)

    async def __aenter__(self) -> Self:
        for _ in range(self._open):
            task = asyncio.create_task(self._one_after_another())
            self._tasks.add(task)
        return self

    async def stop(self, within: float) -> None:
        """Sends nothing more, and waits until what is open has ended. TimeoutError: some have not."""
        self._stopped = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), within)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self.clients:
            client.__exit__(None, None, None)

    async def _one_after_another(self) -> None:
        while not self._stopped:
            host = self._host()
            if host is None:
                await asyncio.sleep(0.1)  # everything is down
                continue
            exchange = await self._send(host)
            if self._rng.random() < self._habits.leave:
                await asyncio.wait([asyncio.ensure_future(exchange.ended)], timeout=self._rng.uniform(*STAY_S))
                exchange.leave()
            await exchange.ended
            if exchange.state is not State.LEFT and not exchange.whole:
                await asyncio.sleep(0.1)  # a host that refuses is not asked in a busy loop

    def _host(self) -> int | None:
        hosts = [0] if self._rng.random() < self._share else list(range(1, len(self.clients)))
        up = [host for host in hosts if self._is_up(host)] or [k for k in range(len(self.clients)) if self._is_up(k)]
        return self._rng.choice(up) if up else None

    async def _send(self, host: int) -> Exchange:
        client, rng = self.clients[host], self._rng
        id = f"h{host}-{len(client.ledger)}"
        words = min(400, max(4, round(rng.lognormvariate(0, 1) * self._words / MEAN)))
        asked = self.asked[id] = Asked(
            name=f"twin-{rng.randrange(TWINS)}" if rng.random() < self._habits.twins else id,
            priority=rng.choice(self._habits.priorities),
            body=chat(f"Chaos {id}", max_tokens=words, ignore_eos=True),
            words=words,
        )
        headers = {"X-Request-Id": asked.name, "X-Penstock-Priority": asked.priority}
        return await client.send(PATH, asked.body, id=id, headers=headers)
