"""The atomic steps, in a real Redis. A: the origin of tickets; B, C: thieves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from broker.cluster import store as limits
from broker.cluster.store import Proposal, Store, StoreAway, TermOver, Told
from tests.broker.cluster.redis_run import redis, run, settings, shared_redis, stores
from tests.support.processes import free_port
from tests.support.redis import RedisServer

__all__ = ["redis", "shared_redis"]

TICKET = Told("0.1.7:1", 250, b"record")


async def joined(store: Store, term: str) -> None:
    await store.join(term, b"who")


async def published(origin: Store, *tickets: Told, tickets_in_all: int = 5) -> None:
    await joined(origin, "a1")
    await origin.publish("a1", tickets_in_all, b"load", [], tickets or (TICKET,), ring=True)


def proposal(lease: str, field: str = TICKET.field, term: str = "a1") -> Proposal:
    return Proposal("A", term, field, lease, b"note", b"letter " + lease.encode())


def test_a_survey_shows_what_others_have_published_with_their_age_by_the_clock_of_redis(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B") as (a, b):
            await published(a)
            await joined(b, "b1")
            (found,) = await b.survey(3, [0])
            assert (found.id, found.term, found.record, found.load) == ("A", "a1", b"who", b"load")
            ((field, (waited_ms, record)),) = found.tickets.items()
            assert (field, record) == (TICKET.field, b"record")
            assert 250 <= waited_ms < 120_000  # what it had waited, and the time since
            assert await a.survey(3, [0]) == []  # a host does not see itself
            assert await b.survey(6, [0]) == []  # fewer wait there
            await a.publish("a1", 0, b"load", [TICKET.field], [], ring=False)
            assert await b.survey(1, [0]) == []

    run(test)


def test_of_two_thieves_the_first_is_heard(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B", "C") as (a, b, c):
            await published(a)
            await joined(b, "b1")
            await joined(c, "c1")
            answers = await asyncio.gather(b.offer("b1", [proposal("lb")]), c.offer("c1", [proposal("lc")]))
            assert sorted(answers) == [[1], [2]]
            (letter,) = await a.collect("a1")
            won = "lb" if answers[0] == [1] else "lc"
            assert letter == b"letter " + won.encode()
            (seen,) = await (c if won == "lb" else b).survey(1, [0])
            assert seen.claimed == {TICKET.field}
            assert await a.collect("a1") == []

    run(test)


def test_many_thieves_get_one_ticket_each_and_none_twice(redis: RedisServer) -> None:
    async def test() -> None:
        names = [f"T{k}" for k in range(6)]
        async with stores(redis, "A", *names) as (a, *thieves):
            tickets = [Told(f"0.1.{k}:{k}", 0, b"record") for k in range(8)]
            await published(a, *tickets)
            for thief, name in zip(thieves, names, strict=True):
                await joined(thief, name)

            async def greedy(thief: Store, name: str) -> list[str]:
                won = []
                for ticket in tickets:
                    lease = f"{name}.{ticket.field}"
                    if await thief.offer(name, [proposal(lease, ticket.field)]) == [1]:
                        won.append(lease)
                return won

            won = await asyncio.gather(*map(greedy, thieves, names))
            leases = sorted(lease for each in won for lease in each)
            assert [lease.partition(".")[2] for lease in sorted(leases, key=lambda each: each.partition(".")[2])] == [
                ticket.field for ticket in tickets
            ]
            letters = await a.collect("a1")
            assert sorted(letter.removeprefix(b"letter ").decode() for letter in letters) == leases

    run(test)


def test_an_offer_is_accepted_once_and_its_ticket_is_used_up(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B", "C") as (a, b, c):
            await published(a)
            await joined(b, "b1")
            await joined(c, "c1")
            assert await b.offer("b1", [proposal("l1")]) == [1]
            assert await a.accept("a1", [("l1", TICKET.field)]) == [True]
            assert await a.accept("a1", [("l1", TICKET.field)]) == [False]
            assert await a.accept("a1", [("never offered", TICKET.field)]) == [False]
            assert await c.offer("c1", [proposal("l2")]) == [0]  # the version is used up

    run(test)


def test_an_offer_for_another_term_of_its_origin_is_void(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B") as (a, b):
            await published(a)
            await joined(b, "b1")
            assert await b.offer("b1", [proposal("l1")]) == [1]
            await joined(a, "a2")  # its scheduler died; the next one knows nothing of the ticket
            assert await b.survey(1, [0]) == []
            assert await a.collect("a2") == []
            assert await b.offer("b1", [proposal("l2")]) == [0]
            assert await b.offer("b1", [proposal("l3", term="a2")]) == [0]
            for late in (
                a.collect("a1"),
                a.accept("a1", [("l1", TICKET.field)]),
                a.publish("a1", 0, b"", [], [], ring=False),
            ):
                with pytest.raises(TermOver):
                    await late

    run(test)


def test_a_thief_whose_term_is_over_offers_nothing(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B") as (a, b):
            await published(a)
            await joined(b, "b1")
            await joined(b, "b2")
            with pytest.raises(TermOver):
                await b.offer("b1", [proposal("l1")])
            assert await a.collect("a1") == []

    run(test)


def test_a_lease_lives_while_its_holder_beats_and_a_thief_sees_its_end(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LEASE_MS", 1500)

    async def test() -> None:
        async with stores(redis, "A", "B") as (a, b):
            await published(a)
            await joined(b, "b1")
            assert await b.offer("b1", [proposal("l1")]) == [1]
            assert await a.accept("a1", [("l1", TICKET.field)]) == [True]
            for _ in range(4):
                await asyncio.sleep(0.5)  # by the clock of Redis; longer than the lease in all
                await a.beat("a1", ["l1"], [])
                (left,) = (await b.beat("b1", [], [("l1", b"note")])).left_ms
                assert 0 < left <= 1500
            monkeypatch.setattr(limits, "LEASE_MS", 100)
            await a.beat("a1", ["l1"], [])
            while (await b.beat("b1", [], [("l1", b"note")])).left_ms[0] > 0:
                pass  # until the test's limit

    run(test)


def test_a_lease_that_redis_forgot_is_there_again_after_its_holders_beat(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B") as (a, b):
            redis.command("FLUSHALL")
            await joined(a, "a1")
            await joined(b, "b1")
            assert (await b.beat("b1", [], [("l1", b"note")])).left_ms[0] < 0
            await a.beat("a1", ["l1"], [])
            assert (await b.beat("b1", [], [("l1", b"note")])).left_ms[0] > 0

    run(test)


def test_what_is_returned_reaches_the_thief_in_whatever_term_it_is(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B") as (a, b):
            await published(a)
            await joined(b, "b1")
            await b.offer("b1", [proposal("l1"), proposal("l2", "0.1.8:2")])
            await a.accept("a1", [("l1", TICKET.field)])
            kept = await b.join("b2", b"who")
            assert [(lease, note) for lease, note, _ in kept] == [("l1", b"note")]
            await a.give_back([("l1", "B", b"returned"), ("l9", "nobody", b"returned")])
            assert await b.collect("b2") == [b"returned"]
            assert await b.join("b3", b"who") == []

    run(test)


def test_beats_tell_who_else_is_there_and_a_host_that_left_is_not(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B", "C") as (a, b, c):
            await published(a)
            await joined(b, "b1")
            await joined(c, "c1")
            members = (await b.beat("b1", [], [])).members
            assert sorted(members) == [("A", b"who", b"load"), ("C", b"who", b"")]
            await a.leave("a1")
            assert [member.id for member in (await b.beat("b1", [], [])).members] == ["C"]
            assert await b.survey(1, [0]) == []
            with pytest.raises(TermOver):
                await a.beat("a1", [], [])

    run(test)


def test_topics_do_not_see_each_other(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", topic="x") as (a,), stores(redis, "B", topic="y") as (b,):
            await published(a)
            await joined(b, "b1")
            assert (await b.beat("b1", [], [])).members == []
            assert await b.survey(1, [0]) == []

    run(test)


def test_load_is_found_in_the_set_of_its_host(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B", load_shards_num=7) as (a, b):
            await published(a)
            await joined(b, "b1")
            own = limits.shard("A", 7)
            assert await b.survey(1, [number for number in range(7) if number != own]) == []
            assert [found.id for found in await b.survey(1, [own])] == ["A"]

    run(test)


def test_foreign_keys_and_entries_are_survived(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B") as (a, b):
            await published(a)
            await joined(b, "b1")
            redis.command("ZADD", "penstock:default:load:0", 9, "fastdeploy-node")  # of no member: removed
            redis.command("ZADD", "penstock:default:members", 1 << 60, b"\xff\xfe")
            redis.command("HSET", "penstock:default:tickets:A:a1", "odd", b"\xff no time")
            redis.command("HSET", "penstock:default:host:A", "load", b"\xc1")
            (found,) = await b.survey(1, [0])
            assert (list(found.tickets), found.foreign, found.load) == ([TICKET.field], 1, b"\xc1")
            assert redis.command("ZSCORE", "penstock:default:load:0", "fastdeploy-node") == b"$-1\r\n"
            await b.beat("b1", [], [])
            redis.command("SET", "penstock:default:host:B", "not a hash")
            with pytest.raises(StoreAway, match="WRONGTYPE"):
                await b.beat("b1", [], [])

    run(test)


def test_a_full_inbox_refuses_offers(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_LETTERS", 1)

    async def test() -> None:
        async with stores(redis, "A", "B") as (a, b):
            await published(a, TICKET, Told("0.1.8:2", 0, b"record"))
            await joined(b, "b1")
            assert await b.offer("b1", [proposal("l1"), proposal("l2", "0.1.8:2")]) == [1, 0]

    run(test)


def test_letters_and_bells_wake(redis: RedisServer) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B") as (a, b):
            bells = a.bells()
            assert await anext(bells)  # at first: there may be letters already
            await published(a)
            assert not await anext(bells)  # somebody came
            assert not await anext(bells)  # somebody has tickets
            await joined(b, "b1")
            assert not await anext(bells)
            await b.offer("b1", [proposal("l1")])
            assert await anext(bells)
            await bells.aclose()

    run(test)


def test_nothing_in_redis_outlives_its_hosts(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with stores(redis, "A", "B") as (a, b):
            await published(a)
            await joined(b, "b1")
            await b.offer("b1", [proposal("l1")])
            await a.accept("a1", [("l1", TICKET.field)])
            await a.beat("a1", ["l1"], [])
            await b.beat("b1", [], [("l1", b"note")])
            keys = redis.command("KEYS", "*").split(b"\r\n")[2::2]
            assert len(keys) > 5
            for key in keys:
                assert redis.command("PTTL", key) != b":-1\r\n", key

    run(test)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"password": "wrong"}, r"scheduler\.password is wrong or missing"),
        ({"password": ""}, r"scheduler\.password is wrong or missing"),
        ({"db": 99}, r"scheduler\.db does not exist there"),
        ({"host": "nowhere.invalid"}, r"Redis at nowhere\.invalid:\d+, db 0: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    async def test() -> None:
        with RedisServer(tmp_path, password="right") as server:
            store = Store(settings(server, **changes), "A")
            with pytest.raises(StoreAway, match=reason) as raised:
                await store.probe()
            await store.close()
            assert "right" not in str(raised.value)
            assert "wrong " not in str(raised.value).replace("is wrong ", "")

    run(test)


def test_a_redis_that_is_not_there_is_away(tmp_path: Path) -> None:
    async def test() -> None:
        server = RedisServer(tmp_path)
        server.port = free_port()
        store = Store(settings(server), "A")
        with pytest.raises(StoreAway, match=rf"Redis at 127\.0\.0\.1:{server.port}, db 0: .*[Cc]onnect"):
            await store.join("a1", b"who")
        with pytest.raises(StoreAway):
            await anext(store.bells())
        await store.close()

    run(test)


def test_a_redis_that_stands_still_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ANSWER_S", 1.5)  # which the first question must keep to

    async def test() -> None:
        with RedisServer(tmp_path) as server:
            store = Store(settings(server), "A")
            await store.join("a1", b"who")
            assert server.process is not None
            server.process.send_signal(19)
            with pytest.raises(StoreAway, match="no answer"):
                await store.beat("a1", [], [])
            server.process.send_signal(18)
            await store.close()

    run(test)
