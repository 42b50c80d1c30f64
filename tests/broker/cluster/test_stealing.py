"""The rule across hosts: whom to steal from and who gets the place. Every clause alone, then all of them at random."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.cluster.records import HostLoad, Place, Theft, TicketRecord
from broker.cluster.stealing import LOOK, SPREAD, pick, plan
from broker.types import Role

MACHINE, ELSEWHERE = "m-1", "m-2"
TOKEN_MS = 0.2


def ticket(
    ident: str,
    *,
    role: Role = Role.MIXED,
    model: str | None = "m",
    prompt: int = 100,
    cached: int = 0,
    priority: int = 1,
    waited: int = 0,
    home: int = 0,
    pace: float | None = None,
    claimed: bool = False,
) -> TicketRecord:
    return TicketRecord(ident, 1, role, model, prompt, cached, priority, waited, home, pace, claimed)


def host(name: str, line: list[TicketRecord], *, machine: str = MACHINE, tickets: int | None = None) -> HostLoad:
    return HostLoad(
        name,
        f"{name}-term",
        machine,
        len(line) if tickets is None else tickets,
        sum(t.prompt - t.cached for t in line),
        tuple(line),
    )


def line(count: int, name: str = "t", **fields: object) -> list[TicketRecord]:
    """The first has waited longest."""
    return [ticket(f"{name}{k}", waited=1000 - k, **fields) for k in range(count)]


def place(
    slot: int = 0,
    room: int = 1,
    *,
    role: Role = Role.MIXED,
    models: tuple[str, ...] = (),
    machine: str | None = None,
    own: int | None = None,
) -> Place:
    return Place(slot, role, models, room, machine, own)


def planned(
    places: list[Place],
    hosts: list[HostLoad],
    *,
    least: int = 1,
    token_ms: float = TOKEN_MS,
    most: int = 64,
    seed: int = 0,
) -> list[Theft]:
    return plan(places, hosts, min_load_score=least, token_ms=token_ms, most=most, rng=Random(seed))


def first(tickets: list[TicketRecord], token_ms: float = TOKEN_MS, **fields: object) -> str | None:
    """Who gets a place."""
    options: dict[str, object] = {"role": Role.MIXED, "models": (), **fields}
    found = pick(line=tickets, token_ms=token_ms, **options)  # type: ignore[arg-type]  # fields of tests
    return None if found is None else found.ident


# -- who is next -------------------------------------------------------------------------------------------


def test_the_first_in_line_gets_the_place() -> None:
    assert first(line(5)) == "t0"


def test_in_an_empty_line_nobody_does() -> None:
    assert first([]) is None


def test_those_about_to_leave_are_passed_over() -> None:
    assert first(line(5), skip={"t0", "t1"}) == "t2"


def test_a_ticket_of_another_role_is_passed_over() -> None:
    assert first([ticket("p", role=Role.PREFILL), ticket("m")]) == "m"
    assert first([ticket("p", role=Role.PREFILL)]) is None


@pytest.mark.parametrize(
    ("asked", "served", "fits"),
    [
        ("m", (), True),
        ("m", ("m",), True),
        ("m", ("n", "m"), True),
        ("m", ("n",), False),
        (None, ("n",), True),
        (None, (), True),
    ],
)
def test_an_instance_serves_the_models_that_it_names_or_all(
    asked: str | None, served: tuple[str, ...], fits: bool
) -> None:
    assert first([ticket("t", model=asked)], models=served) == ("t" if fits else None)


@pytest.mark.parametrize(("pace", "moves"), [(20.0, True), (19.9, False), (None, True), (0.0, False)])
def test_a_ticket_moves_unless_reading_its_prompt_takes_longer_than_its_wait(pace: float | None, moves: bool) -> None:
    """100 tokens take 20 ms."""
    assert first([ticket("t", prompt=100, pace=pace)]) == ("t" if moves else None)


def test_a_ticket_far_back_expects_to_wait_for_all_before_it_at_its_home() -> None:
    tickets = [ticket(f"t{k}", prompt=100, pace=7.0) for k in range(5)]
    assert first(tickets) == "t2", "the third waits 21 ms, and would be read in 20"


def test_those_of_other_homes_are_not_waited_for() -> None:
    tickets = [ticket(f"t{k}", prompt=100, pace=7.0, home=k) for k in range(5)]
    assert first(tickets) is None


def test_those_about_to_leave_are_not_waited_for() -> None:
    tickets = [ticket(f"t{k}", prompt=100, pace=7.0) for k in range(5)]
    assert first(tickets, skip={"t0"}) == "t3"


def test_those_that_only_others_can_serve_are_waited_for() -> None:
    tickets = [ticket("p", model="n", pace=15.0), ticket("t", prompt=100, pace=15.0)]
    assert first(tickets, models=("m",)) == "t"


def test_what_is_cached_at_home_stays_while_others_are_next_as_well() -> None:
    assert first([ticket("a", cached=90), ticket("b", cached=10), ticket("c", cached=50)]) == "b"


def test_what_the_thief_would_have_to_read_is_the_whole_prompt() -> None:
    """That the victim has 90 of 100 tokens cached makes the ticket cheap there, and there alone."""
    assert first([ticket("t", prompt=100, cached=90, pace=10.0)]) is None


def test_of_equally_cached_tickets_the_first_goes() -> None:
    assert first([ticket("a", cached=50), ticket("b", cached=50)]) == "a"


def test_a_ticket_cached_less_is_looked_for_among_the_next_few_only() -> None:
    tickets = [ticket(f"t{k}", cached=50) for k in range(LOOK)]
    assert first([*tickets[:-1], ticket("less", cached=1)]) == "less"
    assert first([*tickets, ticket("less", cached=1)]) == "t0"


def test_a_lower_priority_does_not_pass_for_being_cached_less() -> None:
    assert first([ticket("high", cached=90, priority=0), ticket("low", priority=2)]) == "high"
    assert first([ticket("high", cached=90, priority=0), ticket("low", priority=2), ticket("h", priority=0)]) == "high"


def test_a_lower_priority_goes_when_no_higher_one_can() -> None:
    assert first([ticket("high", model="n", priority=0), ticket("low", priority=2)], models=("m",)) == "low"


# -- from whom ---------------------------------------------------------------------------------------------


def test_without_room_or_work_nothing_is_stolen() -> None:
    assert planned([], [host("a", line(9))]) == []
    assert planned([place()], []) == []
    assert planned([place()], [host("a", line(9))], most=0) == []


@pytest.mark.parametrize(("waiting", "stolen"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2), (9, 7)])
def test_a_host_keeps_what_is_too_little_to_steal(waiting: int, stolen: int) -> None:
    assert len(planned([place(room=20)], [host("a", line(waiting))], least=3)) == stolen


def test_what_waits_beyond_the_window_counts_too() -> None:
    assert len(planned([place(room=20)], [host("a", line(2), tickets=100)], least=3)) == 2


def test_what_others_have_claimed_is_neither_named_nor_counted() -> None:
    claimed = [t._replace(claimed=True) for t in line(3)]
    thefts = planned([place(room=20)], [host("a", [*claimed, *line(4, "u")])], least=3)
    assert len(thefts) == 2
    assert {theft.ticket.ident for theft in thefts} <= {"u0", "u1", "u2", "u3"}


def test_no_ticket_is_named_twice_nor_a_place_given_twice() -> None:
    thefts = planned([place(0, 3), place(1, 2), place(2, 9)], [host("a", line(4, "a")), host("b", line(4, "b"))])
    assert len({(theft.victim.host, theft.ticket.ident) for theft in thefts}) == len(thefts) == 8
    assert all(count <= {0: 3, 1: 2, 2: 9}[slot] for slot, count in Counter(t.slot for t in thefts).items())


def test_equal_idents_of_two_hosts_are_two_tickets() -> None:
    assert len(planned([place(room=2)], [host("a", line(1)), host("b", line(1))])) == 2


def test_places_take_turns() -> None:
    for seed in range(20):
        thefts = planned([place(k, 5) for k in range(4)], [host("a", line(20))], most=8, seed=seed)
        assert Counter(theft.slot for theft in thefts) == dict.fromkeys(range(4), 2)


def test_at_most_so_many_offers_are_made() -> None:
    assert len(planned([place(k, 5) for k in range(4)], [host("a", line(20))], most=3)) == 3


def test_an_instance_on_loopback_serves_its_own_machine_only() -> None:
    far = host("a", line(9), machine=ELSEWHERE)
    assert planned([place(machine=MACHINE)], [far]) == []
    thefts = planned([place(0, machine=MACHINE), place(1, machine=None)], [far])
    assert [theft.slot for theft in thefts] == [1]


def test_of_two_hosts_that_is_robbed_whose_next_has_waited_longer() -> None:
    young = host("young", [t._replace(waited_ms=5) for t in line(50, "y")])
    old = host("old", [t._replace(waited_ms=9) for t in line(5, "o")])
    for seed in range(50):
        (theft,) = planned([place()], [young, old], seed=seed)
        assert theft.victim is old


@pytest.mark.parametrize(
    ("own", "elsewhere", "stolen"), [(0, 500, 0), (0, 501, 1), (1000, 2000, 0), (1000, 2001, 1), (None, 0, 1)]
)
def test_a_place_is_for_its_own_hosts_tickets_unless_another_has_waited_far_longer(
    own: int | None, elsewhere: int, stolen: int
) -> None:
    waiting = [t._replace(waited_ms=elsewhere) for t in line(5)]
    assert len(planned([place(own=own)], [host("a", waiting)])) == stolen


def test_of_few_named_those_that_are_no_elders_are_not() -> None:
    waiting = [ticket("old", waited=9000), *(ticket(f"young{k}", waited=10) for k in range(5))]
    named = {planned([place(own=100)], [host("a", waiting)], seed=seed)[0].ticket.ident for seed in range(50)}
    assert named == {"old"}


def test_a_host_that_has_nothing_for_the_place_does_not_hide_one_that_has() -> None:
    wrong = [host(f"n{k}", line(9, model="n")) for k in range(6)]
    right = host("m", line(9))
    for seed in range(50):
        (theft,) = planned([place(models=("m",))], [*wrong, right], seed=seed)
        assert theft.victim is right


def test_one_of_the_first_few_is_named() -> None:
    named = {planned([place()], [host("a", line(20))], seed=seed)[0].ticket.ident for seed in range(200)}
    assert named == {f"t{k}" for k in range(SPREAD)}


def test_thieves_that_wake_together_rarely_name_the_same_ticket() -> None:
    """Eight thieves, one place each, eight hosts: at random over the heads of all they would hit 0.5 pairs of the 28
    (28 / (8 hosts x 4 tickets), and the draw of two favours nobody here); all after the oldest, every pair."""
    hosts = [host(f"h{k}", line(20, f"h{k}-")) for k in range(8)]
    same = pairs = 0
    for round_ in range(200):
        named = [planned([place()], hosts, seed=round_ * 8 + thief)[0].ticket.ident for thief in range(8)]
        same += sum(a == b for a, b in itertools.combinations(named, 2))
        pairs += 28
    assert same / pairs < 2 / (8 * SPREAD)


def test_thieves_spread_over_hosts_that_have_waited_alike() -> None:
    hosts = [host(f"h{k}", line(20, f"h{k}-")) for k in range(4)]
    robbed = Counter(planned([place()], hosts, seed=seed)[0].victim.host for seed in range(400))
    assert min(robbed.values()) > 50


def test_the_same_seed_decides_the_same() -> None:
    hosts = [host(f"h{k}", line(9, f"h{k}-")) for k in range(5)]
    places = [place(k, 2) for k in range(4)]
    assert planned(places, hosts, seed=3) == planned(places, hosts, seed=3)


# -- anything ----------------------------------------------------------------------------------------------

roles = st.sampled_from([Role.MIXED, Role.PREFILL])
names = st.sampled_from(["m", "n"])


@st.composite
def hosts(draw: st.DrawFn) -> list[HostLoad]:
    found = []
    for name in draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=4)):
        tickets = [
            ticket(
                f"t{k}",
                role=draw(roles),
                model=draw(st.none() | names),
                prompt=draw(st.integers(1, 300)),
                cached=draw(st.integers(0, 50)),
                priority=draw(st.integers(0, 2)),
                waited=draw(st.integers(0, 9)),
                home=draw(st.integers(0, 2)),
                pace=draw(st.none() | st.floats(0, 100)),
                claimed=draw(st.booleans()),
            )
            for k in range(draw(st.integers(0, 6)))
        ]
        hidden = draw(st.integers(0, 3))
        machine = draw(st.sampled_from([MACHINE, ELSEWHERE]))
        found.append(host(name, tickets, machine=machine, tickets=len(tickets) + hidden))
    return found


@st.composite
def places(draw: st.DrawFn) -> list[Place]:
    return [
        place(
            slot,
            draw(st.integers(1, 3)),
            role=draw(roles),
            models=tuple(draw(st.lists(names, unique=True))),
            machine=draw(st.sampled_from([None, MACHINE])),
        )
        for slot in range(draw(st.integers(0, 3)))
    ]


@given(places(), hosts(), st.integers(1, 4), st.integers(0, 6), st.integers(0, 99))
def test_no_plan_breaks_a_rule(places: list[Place], hosts: list[HostLoad], least: int, most: int, seed: int) -> None:
    thefts = planned(places, hosts, least=least, most=most, seed=seed)
    by_slot = {each.slot: each for each in places}
    assert len(thefts) <= most
    assert all(count <= by_slot[slot].room for slot, count in Counter(t.slot for t in thefts).items())
    assert len({(t.victim.host, t.ticket.ident) for t in thefts}) == len(thefts)
    for victim, count in Counter(t.victim.host for t in thefts).items():
        load = next(h for h in hosts if h.host == victim)
        assert load.tickets - sum(t.claimed for t in load.line) - count >= least - 1
    for theft in thefts:
        thief = by_slot[theft.slot]
        assert theft.ticket in theft.victim.line
        assert not theft.ticket.claimed
        assert theft.ticket.role == thief.role
        assert theft.ticket.model is None or not thief.models or theft.ticket.model in thief.models
        assert thief.machine in (None, theft.victim.machine)


@given(places(), hosts(), st.integers(1, 4), st.integers(0, 99))
def test_no_place_is_left_idle_that_somebody_could_use(
    places: list[Place], hosts: list[HostLoad], least: int, seed: int
) -> None:
    thefts = planned(places, hosts, least=least, seed=seed)
    given_ = Counter(theft.slot for theft in thefts)
    for victim in hosts:
        named = {t.ident for t in victim.line if t.claimed}
        named |= {theft.ticket.ident for theft in thefts if theft.victim is victim}
        if victim.tickets - len(named) < least:
            continue
        for each in places:
            if given_[each.slot] < each.room and each.machine in (None, victim.machine):
                assert pick(each.role, each.models, victim.line, TOKEN_MS, skip=named) is None


@given(hosts(), roles, st.lists(names, unique=True))
def test_who_gets_the_place_passes_nobody_that_loses_as_little(
    hosts: list[HostLoad], role: Role, models: list[str]
) -> None:
    for victim in hosts:
        chosen = pick(role, models, victim.line, TOKEN_MS)
        if chosen is None:
            continue
        before = victim.line[: victim.line.index(chosen)]
        for position, passed in enumerate(before):
            ahead = sum(t.home == passed.home for t in victim.line[: position + 1])
            serves = passed.role == role and (passed.model is None or not models or passed.model in models)
            gains = passed.pace_ms is None or passed.prompt * TOKEN_MS <= ahead * passed.pace_ms
            assert not (serves and gains) or (passed.cached > chosen.cached and passed.priority == chosen.priority)
