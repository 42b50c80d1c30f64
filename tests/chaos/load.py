"""Skewed load that never retries: so many requests are kept open, most of them at one host."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from tests.support.client import Client, Exchange, State, chat

PRIORITIES = ("high", "normal", "normal", "normal", "low")
PATH = "/v1/chat/completions"


class Load:
    """`open` requests at any time, `share` of them at the first host. What ends is followed by the next one.

    The client of each host keeps its ledger; ids say where a request was sent: `h0-17`.
    """

    def __init__(
        self,
        ports: Sequence[int],
        *,
        open: int,
        share: float,
        words: float,
        rng: random.Random,
        priorities: Sequence[str] = PRIORITIES,
        is_up: Callable[[int], bool] = lambda host: True,
    ) -> None:
        """`words`: mean length of an answer; lengths are log-normal. `is_up`: nothing is sent to hosts that are not."""
        self.clients = [Client(port) for port in ports]
        self.priorities: dict[str, str] = {}
        """By the request's id."""
        self._draws = priorities
        self._open = open
        self._share = share
        self._words = words
        self._rng = rng
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
            began = time.monotonic()
            await exchange.ended
            if not exchange.whole and time.monotonic() - began < 0.1:
                await asyncio.sleep(0.1)  # refused at once: not in a busy loop

    def _host(self) -> int | None:
        hosts = [0] if self._rng.random() < self._share else list(range(1, len(self.clients)))
        up = [host for host in hosts if self._is_up(host)] or [k for k in range(len(self.clients)) if self._is_up(k)]
        return self._rng.choice(up) if up else None

    async def _send(self, host: int) -> Exchange:
        client = self.clients[host]
        id = f"h{host}-{len(client.ledger)}"
        words = min(400, max(4, round(self._rng.lognormvariate(0, 1) * self._words / 1.65)))
        priority = self.priorities[id] = self._rng.choice(self._draws)
        body = chat(f"Chaos {id}", max_tokens=words, ignore_eos=True)
        return await client.send(PATH, body, id=id, headers={"X-Penstock-Priority": priority})
