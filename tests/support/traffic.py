"""Steady traffic: requests begun at a fixed rate, whatever becomes of those before.

    async with Traffic(client, rate=40) as traffic:
        before = await traffic.window(2.0)
    assert p99(before) ...

An open loop: a request that hangs holds up none of the others, so every one that should have been sent is measured.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tests.support.client import Client, Exchange, State, chat
from tests.support.waiting import PATIENCE_S


class Traffic:
    """Streams of `words` words over one client, `rate` of them begun per second, from entering to leaving the block.

    Leaving waits until the last one has ended.
    """

    def __init__(self, client: Client, *, rate: float, words: int = 8) -> None:
        self.exchanges: list[Exchange] = []
        self._client = client
        self._pause = 1 / rate
        self._words = words
        self._sends: set[asyncio.Task[None]] = set()

    async def window(self, seconds: float) -> list[Exchange]:
        """Lets it flow for so long; the exchanges begun meanwhile, ended or not."""
        first = len(self.exchanges)
        await asyncio.sleep(seconds)  # the time itself is the point: how much traffic there is to look at
        return self.exchanges[first:]

    async def __aenter__(self) -> Self:
        self._flow = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._flow.cancel()
        await asyncio.wait([self._flow])
        if kind is None:
            await asyncio.gather(*self._sends)
            await ended(self.exchanges)

    async def _run(self) -> None:
        due = time.monotonic()
        while True:
            send = asyncio.create_task(self._send())
            self._sends.add(send)
            send.add_done_callback(self._sends.discard)
            due += self._pause
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _send(self) -> None:
        number = len(self._client.ledger)
        self.exchanges.append(
            await self._client.send(
                "/v1/chat/completions", chat(f"Traffic {number}", max_tokens=self._words, ignore_eos=True)
            )
        )


async def ended(exchanges: Sequence[Exchange], within: float = PATIENCE_S) -> None:
    """Until each of them has ended, somehow."""
    await asyncio.wait_for(asyncio.gather(*(exchange.ended for exchange in exchanges)), within)


def p99(exchanges: Sequence[Exchange]) -> float:
    """Of the times to their ends, in seconds; one that has not ended counts as endless."""
    times = sorted(e.ended_at - e.sent_at if e.state is not State.OPEN else math.inf for e in exchanges)
    return times[math.ceil(0.99 * len(times)) - 1]
