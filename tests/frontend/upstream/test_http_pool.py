"""Which of its kept connections a pool gives out, and which it closes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from frontend.upstream.http_connection import Connection
from frontend.upstream.http_pool import Pool


class Transport:
    closing = False

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True

    def resume_reading(self) -> None: ...


def kept(pool: Pool, loop: asyncio.AbstractEventLoop) -> Connection:
    connection = Connection(pool, None, loop)
    connection._transport = cast("asyncio.Transport", Transport())
    pool._connections.add(connection)
    pool.spare(connection)
    return connection


def played(scene: Callable[[Pool, list[Connection]], None]) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        pool = Pool("http://engine:80", 8, loop, idle_s=3600)
        scene(pool, [kept(pool, loop) for _ in range(3)])
        assert pool._reaper is None or not pool._reaper.cancelled()
        if pool._reaper is not None:
            pool._reaper.cancel()

    asyncio.run(run())


def test_the_one_used_last_is_given_out_first_and_none_that_is_gone() -> None:
    def scene(pool: Pool, connections: list[Connection]) -> None:
        first, second, third = connections
        second.abort()
        pool.gone(second)
        assert repr(pool) == "<Pool http://engine:80 busy=0 idle=2 waiting=0>"
        assert [pool.idle(), pool.idle(), pool.idle()] == [third, first, None]

    played(scene)


def test_what_nobody_needed_between_two_looks_is_closed() -> None:
    def scene(pool: Pool, connections: list[Connection]) -> None:
        third = connections[-1]
        pool._reap()
        assert all(connection.is_usable for connection in connections)
        assert pool.idle() is third
        pool.spare(third)
        pool._reap()
        assert [connection.is_usable for connection in connections] == [False, False, True]
        assert pool.idle() is third
        pool.spare(third)
        pool._reap()
        assert third.is_usable
        pool._reap()
        assert not third.is_usable
        assert pool._reaper is None
        assert pool.idle() is None

    played(scene)


def test_one_that_was_taken_and_not_given_back_spares_only_those_above_it() -> None:
    def scene(pool: Pool, connections: list[Connection]) -> None:
        _, second, third = connections
        pool._reap()
        assert [pool.idle(), pool.idle()] == [third, second]
        pool.spare(second)
        pool._reap()
        assert [connection.is_usable for connection in connections] == [False, True, True]

    played(scene)
