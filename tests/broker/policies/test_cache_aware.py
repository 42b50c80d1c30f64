"""FastDeploy's sums, and what was mended in them. Numbers are worked out in the comments."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.policies import Options, Picker, make_policy
from broker.policies.cache_aware import CacheAware
from broker.policies.remote_cache_aware import RemoteCacheAware
from broker.route import RouteRequest
from tests.support.loads import FakeLoads
from tests.support.prefix import Prefixes

EXAMPLE = Options(hit_ratio_weight=1.0, load_balance_weight=0.05)
PROMPT = "aaaabbbbccccdddd"
REQUEST = RouteRequest(prompt=PROMPT, prompt_tokens=16)


@pytest.fixture
def prefixes(tmp_path: Path) -> Prefixes:
    return Prefixes(tmp_path)


def policy(prefixes: Prefixes, options: Options = EXAMPLE, seed: int = 1) -> CacheAware:
    return CacheAware(options, Random(seed), prefixes.index)


def choices(rule: Picker, view: FakeLoads, request: RouteRequest = REQUEST, n: int = 60) -> set[int]:
    return {rule.pick(request, view) for _ in range(n)}


def test_hits_win_over_a_small_difference_of_load(prefixes: Prefixes) -> None:
    prefixes.sent(PROMPT, 101)
    view = FakeLoads(3).having(in_flight=[4, 5, 4])
    # 101: 0 x 1 + 5/5 x 0.05 = 0.05; others: 1 + 0.04
    assert choices(policy(prefixes), view) == {101}


@pytest.mark.parametrize(
    ("hit", "balance", "slot"),
    [
        (0.1, 1.0, 100),  # 101 has 25 %: 0.75 x 0.1 + 5/5 x 1 = 1.075; 100: 1 x 0.1 + 4/5 x 1 = 0.9
        (1.0, 0.2, 101),  # 101: 0.75 x 1 + 0.2 = 0.95; 100: 1 + 0.16 = 1.16
    ],
)
def test_the_weights_decide_between_hits_and_load(prefixes: Prefixes, hit: float, balance: float, slot: int) -> None:
    prefixes.sent(PROMPT[:4], 101)
    options = Options(hit_ratio_weight=hit, load_balance_weight=balance)
    assert policy(prefixes, options).pick(REQUEST, FakeLoads(2).having(in_flight=[4, 5])) == slot


@pytest.mark.parametrize(
    ("loads", "slot"),
    [
        ([0, 2], 101),  # 2 apart > 1, 2/2 > 0.2: uneven, fewest tokens
        ([0, 1], 100),  # 1 apart is not more than 1: even, the hit decides
        ([10, 12], 100),  # 2 apart > 1, but 2/12 is not more than 0.2: even
        ([10, 13], 101),  # 3/13 > 0.2: uneven
    ],
)
def test_loads_count_as_uneven_beyond_both_thresholds(prefixes: Prefixes, loads: list[int], slot: int) -> None:
    prefixes.sent(PROMPT, 100)
    view = FakeLoads(2).having(in_flight=loads, tokens=[9, 1])
    assert policy(prefixes).pick(REQUEST, view) == slot


def test_an_uneven_or_textless_choice_goes_to_the_fewest_tokens_and_is_not_recorded(prefixes: Prefixes) -> None:
    uneven = FakeLoads(2).having(in_flight=[9, 0], tokens=[1, 2])
    rule = policy(prefixes)
    assert rule.pick(REQUEST, uneven) == 100
    rule.placed(REQUEST, 100)
    idle, textless = FakeLoads(2).having(tokens=[2, 1]), RouteRequest()
    assert rule.pick(textless, idle) == 101
    rule.placed(textless, 101)
    assert prefixes.index.batch() is None


@pytest.mark.parametrize("rule", [CacheAware, RemoteCacheAware])
def test_an_even_choice_is_recorded_where_the_request_goes(
    prefixes: Prefixes, rule: type[CacheAware | RemoteCacheAware]
) -> None:
    made = rule(EXAMPLE, Random(1), prefixes.index)
    slot = made.pick(REQUEST, FakeLoads(3))
    assert prefixes.who_has(PROMPT) == {}
    made.placed(REQUEST, slot)
    assert prefixes.who_has(PROMPT) == {slot: 4}
    assert made.cached(REQUEST) == {slot: 16}
    made.pick(RouteRequest(prompt="another one"), FakeLoads(3))
    made.placed(REQUEST, 110)  # granted there in the end
    assert prefixes.who_has(PROMPT) == {slot: 4, 110: 4}


def test_it_says_what_decided(prefixes: Prefixes) -> None:
    prefixes.sent(PROMPT[:8], 101)
    rule = policy(prefixes)
    assert rule.pick(REQUEST, FakeLoads(2)) == 101
    assert rule.why is not None
    assert rule.why.scores == [1.0, 0.5]
    assert rule.why.depths == [0, 2]
    rule.pick(REQUEST, FakeLoads(2).having(in_flight=[9, 0], tokens=[1, 2]))
    assert rule.why.depths is None
    assert rule.why.reason == "load imbalanced"


@pytest.mark.parametrize(("tokens", "slot"), [([5, 6], 100), ([6, 5], 101)])
def test_hits_are_whole_percents_of_the_full_blocks(prefixes: Prefixes, tokens: list[int], slot: int) -> None:
    """2 of 3 blocks is 66, so that 100 has 0.34 + 100/100 x 0.66, and 101 has 1 + 0: equal, and tokens decide."""
    prefixes.sent("aaaabbbb", 100)
    options = Options(hit_ratio_weight=1.0, load_balance_weight=0.66, balance_abs_threshold=1000)
    view = FakeLoads(2).having(in_flight=[100, 0], tokens=tokens)
    assert policy(prefixes, options).pick(RouteRequest(prompt="aaaabbbbxxxxyy"), view) == slot


def test_equals_are_drawn(prefixes: Prefixes) -> None:
    request = RouteRequest(prompt="zz")  # shorter than a block: no hits for anybody, nothing recorded
    assert choices(policy(prefixes), FakeLoads(3), request) == {100, 101, 102}


def test_the_second_best_keeps_its_own_hits(prefixes: Prefixes) -> None:
    """The original gives 0 to all but the deepest: with the best one gone from the even range it would draw."""
    prefixes.sent(PROMPT, 100)
    prefixes.sent(PROMPT[:12], 101)
    view = FakeLoads(3).having(in_flight=[1, 0, 0])
    options = Options(hit_ratio_weight=1.0, load_balance_weight=0.5)
    # 100: 0 + 0.5; 101: 0.25 + 0; 102: 1 + 0
    assert policy(prefixes, options).pick(REQUEST, view) == 101


def test_an_owner_keeps_its_hits_when_another_diverges_in_the_middle(prefixes: Prefixes) -> None:
    prefixes.sent(PROMPT, 100)
    prefixes.sent("aaaabbbbzzzz", 101)
    assert prefixes.who_has("aaaabbbb") == {100: 2, 101: 2}
    assert prefixes.who_has(PROMPT) == {100: 4, 101: 2}


def test_the_remote_variant_weighs_what_engines_report(prefixes: Prefixes) -> None:
    view = FakeLoads(2).having(in_flight=[0, 9], load=[9, 0], tokens=[1, 1])
    options = Options(hit_ratio_weight=0.0, load_balance_weight=1.0, balance_abs_threshold=1000)
    assert RemoteCacheAware(options, Random(1), prefixes.index).pick(REQUEST, view) == 101
    assert CacheAware(options, Random(1), prefixes.index).pick(REQUEST, view) == 100


def test_token_ids_count_as_text_does(prefixes: Prefixes) -> None:
    request = RouteRequest(prompt_ids=[1, 2, 3, 4, 5, 6, 7, 8], prompt_tokens=8)
    rule = policy(prefixes)
    first = rule.pick(request, FakeLoads(8))
    rule.placed(request, first)
    assert choices(policy(prefixes), FakeLoads(8), request) == {first}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sent=st.lists(st.tuples(st.sampled_from(["", "aaaa", "bbbb", "cccc"]), st.integers(100, 103)), max_size=4),
    loads=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    tokens=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    balance=st.sampled_from([0.0, 0.25, 1.0]),
    threshold=st.sampled_from([1.0, 100.0]),
)
def test_few_and_many_candidates_are_weighed_alike(
    prefixes: Prefixes, sent: list[tuple[str, int]], loads: list[int], tokens: list[int], balance: float, threshold: int
) -> None:
    """By lists and by numpy: the same choice, drawn alike, for the same reason."""
    for second, slot in sent:
        prefixes.sent("aaaa" + second + "dddd", slot)
    options = Options(load_balance_weight=balance, balance_abs_threshold=threshold)
    few, many = policy(prefixes, options), policy(prefixes, options)
    view = FakeLoads(4).having(in_flight=loads, tokens=tokens)
    for request in (REQUEST, RouteRequest(prompt="aaaabbbbdddd"), RouteRequest()):
        assert few._of_few(request, view, tuple(loads)) == many._of_many(request, view, view.in_flight)
        for name in ("scores", "depths", "blocks", "loads", "hits", "reason"):
            one, other = getattr(few.why, name), getattr(many.why, name)
            assert np.array_equal(one, other), name


@pytest.mark.parametrize("name", ["cache_aware", "remote_cache_aware", "prefix_cost"])
def test_is_made_by_name_where_there_is_an_index(prefixes: Prefixes, name: str) -> None:
    rule = make_policy(name, EXAMPLE, Random(1), 0.0, prefixes.index)
    assert rule.pick(REQUEST, FakeLoads(3)) in {100, 101, 102}
