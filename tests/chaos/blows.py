"""Kills, and on demand freezes, in random order, never waiting for what the last one broke."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import psutil

from tests.chaos.hosts import RESTART_WITHIN, Host
from tests.chaos.load import Load
from tests.support.redis import RedisServer
from tests.support.waiting import eventually

STREAMS = 20
"""Under way whenever something is killed."""
RECOVERY_S = 60.0
"""So many streams are under way again so soon, whatever was killed."""
LEAST_PER_MINUTE = 6
"""Kills. On a machine so busy that there are fewer a run takes longer, twice as long at most."""
PAUSE_S = (1.5, 5.0)
REDIS_AWAY_S = (0.2, 4.0)


class Kind(StrEnum):
    HOST = "host"
    FRONTEND = "frontend"
    SCHEDULER = "scheduler"
    REDIS = "redis"
    FROZEN_SCHEDULER = "frozen scheduler"
    FROZEN_REDIS = "frozen redis"


KILLS = (Kind.HOST, Kind.FRONTEND, Kind.SCHEDULER, Kind.REDIS)
NO_HOST = (Kind.REDIS, Kind.FROZEN_REDIS)
ROUND = (Kind.HOST, Kind.FRONTEND, Kind.FRONTEND, Kind.SCHEDULER, Kind.SCHEDULER, Kind.REDIS)
"""Shuffled, then dealt out: every kind comes in any minute."""
FREEZES = (Kind.FROZEN_SCHEDULER, Kind.FROZEN_REDIS)
"""Put among them on demand. Not dead, and back with all that it knew and believes: other faults than death brings."""
FROZEN_S = (0.5, 9.0)
"""Shorter and longer than any lease."""


@dataclass
class Blow:
    kind: Kind
    host: int
    """-1: Redis."""
    at: float
    streams: int
    """Under way when it fell."""
    over: float = float("inf")
    """When what was killed was there again."""

    def __str__(self) -> str:
        return f"{self.kind}{'' if self.host < 0 else f' {self.host}'}"


class Blows:
    """Strikes; owner of what is down. `say` gets a line for each blow."""

    def __init__(
        self,
        redis: RedisServer,
        hosts: Sequence[Host],
        rng: random.Random,
        say: Callable[[str], None],
        *,
        freezes: bool = False,
    ) -> None:
        self._round = (*ROUND, *FREEZES) if freezes else ROUND
        self.struck: list[Blow] = []
        self._redis = redis
        self._hosts = hosts
        self._rng = rng
        self._say = say
        self._began = time.monotonic()
        self._down: set[int] = set()
        self._redis_down = False
        self._repairs: set[asyncio.Task[None]] = set()
        self._bag: list[Kind] = []

    def is_up(self, host: int) -> bool:
        return host not in self._down

    async def strike_for(self, seconds: float, load: Load) -> None:
        """Raises what a repair raised: something did not come back."""
        began, least = time.monotonic(), LEAST_PER_MINUTE * seconds / 60
        while (now := time.monotonic()) < began + seconds or (self.kills() < least and now < began + 2 * seconds):
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))  # how often they fall is the point
            for task in [task for task in self._repairs if task.done()]:
                self._repairs.discard(task)
                task.result()
            await eventually(
                lambda: load.streaming() >= STREAMS,
                lambda: f"{STREAMS} streams; {load.streaming()} are under way, {load.waiting()} wait",
                RECOVERY_S,
            )
            await self._strike(load)

    def kills(self) -> int:
        return sum(blow.kind in KILLS for blow in self.struck)

    async def repaired(self) -> None:
        """Everything that was killed is there again."""
        await asyncio.gather(*self._repairs)

    async def _strike(self, load: Load) -> None:
        kind, host = self._next()
        blow = Blow(kind, host, time.monotonic(), load.streaming())
        self.struck.append(blow)
        waiting = load.waiting()
        match kind:
            case Kind.REDIS:
                self._redis_down = True
                await asyncio.to_thread(self._rng.choice((self._redis.kill, self._redis.stop)))
                repair = self._again_redis(blow)
            case Kind.FROZEN_REDIS:
                self._redis_down = True
                assert self._redis.process is not None
                self._redis.process.send_signal(signal.SIGSTOP)
                repair = self._thaw_redis(blow)
            case Kind.FROZEN_SCHEDULER:
                scheduler = self._hosts[host].process("scheduler")
                scheduler.suspend()
                repair = self._thaw(blow, scheduler)
            case Kind.HOST:
                self._down.add(host)
                await asyncio.to_thread(self._hosts[host].kill_host)
                repair = self._again_host(blow)
            case _:
                name = self._process(kind, host)
                epoch = await asyncio.to_thread(self._epoch, host)
                pid = await asyncio.to_thread(self._hosts[host].kill, name)
                repair = self._again_process(blow, name, pid, epoch + (kind is Kind.SCHEDULER))
        self._repairs.add(asyncio.create_task(repair))
        self._say(
            f"{blow.at - self._began:6.1f} s  {len(self.struck):3}  {blow!s:18} {blow.streams:3} streams under way, "
            f"{waiting} waiting, {sum(exchange.whole for exchange in load.exchanges)} answered"
        )

    def _next(self) -> tuple[Kind, int]:
        """What can be killed now: not what is down already."""
        while True:
            if not self._bag:
                self._bag = self._rng.sample(self._round, len(self._round))
            kind = self._bag.pop()
            if kind in NO_HOST:
                if not self._redis_down:
                    return kind, -1
                continue
            up = [k for k in range(len(self._hosts)) if self.is_up(k)]
            if kind is Kind.HOST and len(up) < 2:
                continue
            candidates = [k for k in up if kind is Kind.HOST or self._process(kind, k)]
            if candidates:
                return kind, self._rng.choice(candidates)

    def _process(self, kind: Kind, host: int) -> str:
        """A living one of the kind; empty: none."""
        prefix = kind.removeprefix("frozen ")
        names = sorted(name for name in self._hosts[host].processes() if name.startswith(prefix))
        return self._rng.choice(names) if names else ""

    # -- what was killed comes back ------------------------------------------------------------------------

    async def _again_redis(self, blow: Blow) -> None:
        await asyncio.sleep(self._rng.uniform(*REDIS_AWAY_S))  # a time without it is the point
        await asyncio.to_thread(self._redis.start)
        self._redis_down = False
        blow.over = time.monotonic()

    async def _thaw_redis(self, blow: Blow) -> None:
        await asyncio.sleep(self._rng.uniform(*FROZEN_S))  # the time is the point
        assert self._redis.process is not None
        self._redis.process.send_signal(signal.SIGCONT)
        self._redis_down = False
        blow.over = time.monotonic()

    async def _thaw(self, blow: Blow, process: psutil.Process) -> None:
        await asyncio.sleep(self._rng.uniform(*FROZEN_S))  # the time is the point
        with contextlib.suppress(psutil.NoSuchProcess):  # killed meanwhile
            process.resume()
        await self._served(blow, 0)
        blow.over = time.monotonic()

    async def _again_host(self, blow: Blow) -> None:
        await asyncio.to_thread(self._hosts[blow.host].restart)
        self._down.discard(blow.host)
        blow.over = time.monotonic()

    async def _again_process(self, blow: Blow, name: str, pid: int, epoch: int) -> None:
        """Its supervisor sees to that, unless it is killed meanwhile."""
        host = self._hosts[blow.host]
        supervisor = host.supervisor

        def replaced() -> bool:
            if host.supervisor is not supervisor or not self.is_up(blow.host):
                return True
            process = host.processes().get(name)
            return process is not None and process.pid != pid

        await eventually(replaced, lambda: f"{name} of host {blow.host} replaced", RESTART_WITHIN)
        await self._served(blow, epoch)
        blow.over = time.monotonic()

    async def _served(self, blow: Blow, epoch: int) -> None:
        """A scheduler of at least that epoch is at work: a process may be there long before it does anything."""
        host = self._hosts[blow.host]

        def serves() -> bool:
            if not self.is_up(blow.host):
                return True  # killed as a whole meanwhile
            with contextlib.suppress(OSError):
                scheduler = host.get("/ready")[1]["scheduler"]
                return bool(scheduler["state"] == "alive" and scheduler["epoch"] >= epoch)
            return False

        deadline = time.monotonic() + RESTART_WITHIN
        while not await asyncio.to_thread(serves):
            assert time.monotonic() < deadline, f"no scheduler at host {blow.host} after {blow}"
            await asyncio.sleep(0.1)

    def _epoch(self, host: int) -> int:
        epoch: int = self._hosts[host].get("/ready")[1]["scheduler"]["epoch"]
        return epoch
