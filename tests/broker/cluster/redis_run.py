"""A Redis for the tests of one file, emptied before each test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path

import msgspec
import pytest

from broker.cluster.store import Store
from broker.config import Scheduler
from tests.support.redis import RedisServer


@pytest.fixture(scope="module")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(Path(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    shared_redis.command("FLUSHALL")
    return shared_redis


def settings(redis: RedisServer, **more: object) -> Scheduler:
    told = {"name": "global", "port": redis.port, "password": redis.password, **more}
    return msgspec.structs.replace(Scheduler(), **told)


@contextlib.asynccontextmanager
async def stores(redis: RedisServer, *hosts: str, **more: object) -> AsyncIterator[list[Store]]:
    """Of hosts that are not members yet."""
    made = [Store(settings(redis, **more), host) for host in hosts]
    try:
        yield made
    finally:
        for store in made:
            await store.close()


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    """A test that is a coroutine, with a limit: a Redis that hangs is a failure."""

    async def limited() -> None:
        async with asyncio.timeout(120):
            await test()

    asyncio.run(limited())
