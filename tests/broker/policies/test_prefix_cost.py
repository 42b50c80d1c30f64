"""`prefix_cost`: each of its four costs by itself, and what a copy costs."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from broker.policies.prefix_cost import PrefixCost
from broker.route import RouteRequest
from tests.support.loads import FakeLoads
from tests.support.prefix import BLOCK, Prefixes

HEAD = "".join(f"{i:04d}" for i in range(100))


@pytest.fixture
def prefixes(tmp_path: Path) -> Prefixes:
    return Prefixes(tmp_path)


def ask(prompt: str) -> RouteRequest:
    """A prompt of as many tokens as characters."""
    return RouteRequest(prompt=prompt, prompt_tokens=len(prompt))


def fresh(prefixes: Prefixes, seed: int = 1) -> PrefixCost:
    return PrefixCost(Random(seed), prefixes.index)


def test_stays_with_the_instance_that_has_the_prompt(prefixes: Prefixes) -> None:
    prefixes.sent(HEAD, 102)
    for seed in range(20):
        assert fresh(prefixes, seed).pick(ask(HEAD + "more"), FakeLoads(8)) == 102


def test_what_nobody_has_goes_where_least_is_queued(prefixes: Prefixes) -> None:
    view = FakeLoads(3).having(tokens=[500, 100, 300], in_flight=[1, 1, 1])
    assert fresh(prefixes).pick(ask(HEAD), view) == 101


def test_what_nobody_has_goes_where_fewest_requests_are(prefixes: Prefixes) -> None:
    view = FakeLoads(3).having(in_flight=[9, 8, 7])
    assert fresh(prefixes).pick(ask(HEAD), view) == 102


def test_a_rare_head_is_not_copied_for_a_queue_that_is_shorter_than_its_cost(prefixes: Prefixes) -> None:
    """400 tokens, once for itself and 4 + 16 times for others: 8,400. A queue of 7,000 is shorter, one of 9,000 not."""
    prefixes.sent(HEAD, 100)
    assert fresh(prefixes).pick(ask(HEAD), FakeLoads(8).having(tokens=[7_000, *[0] * 7])) == 100
    assert fresh(prefixes).pick(ask(HEAD), FakeLoads(8).having(tokens=[9_000, *[0] * 7])) != 100


def test_what_many_have_asked_for_moves_away_from_a_shorter_queue_than_what_one_has(prefixes: Prefixes) -> None:
    """Eight in a thousand: one copy is enough, but it will be used again. 400 tokens x (1 + 4 + 16 / 8) are 2,800."""
    for number in range(1000):
        prefixes.sent(f"{number:08d}", 100)
    for _ in range(8):
        prefixes.sent(HEAD, 100)
    assert fresh(prefixes).pick(ask(HEAD), FakeLoads(8).having(tokens=[2_500, *[0] * 7])) == 100
    assert fresh(prefixes).pick(ask(HEAD), FakeLoads(8).having(tokens=[3_100, *[0] * 7])) != 100


def test_a_head_that_everybody_has_is_copied_at_the_first_sign_of_a_queue(prefixes: Prefixes) -> None:
    for _ in range(200):
        prefixes.sent(HEAD, 100)
    assert fresh(prefixes).pick(ask(HEAD), FakeLoads(8).having(tokens=[1_000, *[0] * 7])) != 100


def test_a_head_is_copied_as_far_as_its_share_goes(prefixes: Prefixes) -> None:
    """A quarter of the requests have it: its fair two of eight instances at once, and no fifth for the same queue."""
    for number in range(400):
        prefixes.sent(HEAD if number % 4 == 0 else f"{number:08d}", 100)
    busy = 1_500  # of 2,000 that a fifth would cost: 400 tokens, once for itself and 4 times for those behind it
    for copies in range(1, 8):
        view = FakeLoads(8).having(tokens=[busy] * copies + [0] * (8 - copies))
        slot = fresh(prefixes).pick(ask(HEAD), view)
        if slot < 100 + copies:
            break
        prefixes.sent(HEAD, 100 + copies)
    assert copies in {2, 3, 4}


@pytest.mark.parametrize("copies", [1, 4, 7])
def test_a_head_that_everybody_has_gets_to_every_instance(prefixes: Prefixes, copies: int) -> None:
    """Its own wait is all that a copy costs then: with 400 tokens to compute, a queue of 500 is the longer one."""
    for number in range(200):
        prefixes.sent(HEAD, 100 + number % copies)
    view = FakeLoads(8).having(tokens=[500] * copies + [0] * (8 - copies))
    assert fresh(prefixes).pick(ask(HEAD), view) >= 100 + copies
    view = FakeLoads(8).having(tokens=[300] * copies + [0] * (8 - copies))
    assert fresh(prefixes).pick(ask(HEAD), view) < 100 + copies


def test_a_block_that_the_table_has_lost_hides_none_behind_it(prefixes: Prefixes) -> None:
    """A key stands for all in front of it. The uses of a lost one are at least those of the next."""
    for _ in range(200):
        prefixes.sent(HEAD, 100, 101)
    keys = prefixes.index.match(ask(HEAD)).keys
    table = prefixes.writer._table
    table._remove(np.flatnonzero(np.isin(table._flat, keys[3:50])))
    match = prefixes.index.match(ask(HEAD))
    assert len(match.found.at) == len(keys) - 47
    assert prefixes.who_has(HEAD) == {100: len(keys), 101: len(keys)}
    assert match.uses(np.arange(len(keys))).min() > 100


def test_only_the_hot_part_of_a_prompt_is_cheap_to_copy(prefixes: Prefixes) -> None:
    """Everybody begins alike; what this client alone said since then stays where it is."""
    own = "".join(f"{i:04x}" for i in range(5000, 5100))
    for _ in range(200):
        prefixes.sent(HEAD, 100)
    prefixes.sent(HEAD + own, 100)
    view = FakeLoads(8).having(tokens=[4_000, *[0] * 7])
    assert fresh(prefixes).pick(ask(HEAD), view) != 100
    assert fresh(prefixes).pick(ask(HEAD + own), view) == 100


def test_equals_are_drawn(prefixes: Prefixes) -> None:
    request = ask("abc")  # no full block: nothing is noted
    assert {fresh(prefixes, seed).pick(request, FakeLoads(4)) for seed in range(60)} == {100, 101, 102, 103}


def test_unknown_prompts_are_spread_evenly_even_if_nothing_is_ever_in_flight(prefixes: Prefixes) -> None:
    policy, view = fresh(prefixes), FakeLoads(8)
    work = np.zeros(8)
    rng = Random(2)
    for number in range(800):
        prompt = f"{number:04d}" * rng.randrange(1, 50)
        request = ask(prompt)
        slot = policy.pick(request, view)
        policy.placed(request, slot)
        work[slot - 100] += len(prompt)
        prefixes.deliver()
    assert work.max() / work.mean() < 1.02


def test_the_lease_is_for_what_must_be_computed(prefixes: Prefixes) -> None:
    prefixes.sent(HEAD, 102)
    policy = fresh(prefixes)
    request = ask(HEAD + "x" * 40)
    assert policy.tokens(request, policy.pick(request, FakeLoads(8))) == 40
    assert policy.tokens(request, 101) == len(HEAD) + 40
    request = ask("y" * 7 * BLOCK)
    assert policy.tokens(request, policy.pick(request, FakeLoads(8))) == 7 * BLOCK


def test_what_is_only_considered_is_not_noted(prefixes: Prefixes) -> None:
    policy = fresh(prefixes)
    request = ask(HEAD)
    policy.pick(request, FakeLoads(8))
    assert prefixes.index.batch() is None
    policy.pick(ask("another"), FakeLoads(8))
    policy.placed(request, 105)
    assert prefixes.who_has(HEAD) == {105: len(HEAD) // BLOCK}


def test_it_says_what_decided(prefixes: Prefixes) -> None:
    prefixes.sent(HEAD, 102)
    policy = fresh(prefixes)
    assert policy.why is None
    slot = policy.pick(ask(HEAD + "12"), FakeLoads(4))
    assert policy.why is not None
    assert policy.why.scores.argmin() == slot - 100 == 2
    assert policy.why.depths is not None
    assert policy.why.depths.tolist() == [0, 0, len(HEAD) // BLOCK, 0]
    assert policy.why.blocks == (len(HEAD) + 2) / BLOCK


def test_it_says_what_each_instance_has_cached(prefixes: Prefixes) -> None:
    prefixes.sent(HEAD, 102)
    prefixes.sent(HEAD[: 7 * BLOCK], 103)
    assert fresh(prefixes).cached(ask(HEAD + "xyz")) == {102: len(HEAD), 103: 7 * BLOCK}
    assert fresh(prefixes).cached(ask("unknown prompt")) == {}


def test_a_prompt_beyond_the_cap_counts_by_its_whole_length(tmp_path: Path) -> None:
    prefixes = Prefixes(tmp_path)
    prompt = "".join(f"{i:04x}" for i in range(2048))  # 2,048 blocks, of which 1,024 count
    prefixes.sent(prompt, 102)
    policy = fresh(prefixes)
    assert policy.pick(ask(prompt), FakeLoads(8)) == 102
    assert policy.tokens(ask(prompt), 102) == len(prompt) / 2


def test_the_unit_of_tokens_does_not_matter(tmp_path: Path) -> None:
    """Estimates may be off by any factor; only that a lease is for whole tokens is seen in very short prompts."""
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    assert _choices(Prefixes(tmp_path / "1"), scale=64) == _choices(Prefixes(tmp_path / "2"), scale=4096)


def _choices(prefixes: Prefixes, scale: int) -> list[int]:
    policy, view, rng = fresh(prefixes), FakeLoads(4), Random(3)
    chosen = []
    for _ in range(200):
        prompt = HEAD[: 40 * rng.randrange(1, 10)] + f"{rng.randrange(9):04d}" * 20
        request = RouteRequest(prompt=prompt, prompt_tokens=len(prompt) * scale)
        chosen.append(policy.pick(request, view))
        view.in_flight[chosen[-1] - 100] += 1
        view.tokens[chosen[-1] - 100] += policy.tokens(request, chosen[-1])
        policy.placed(request, chosen[-1])
        prefixes.deliver()
    return chosen


def test_of_what_was_sent_long_ago_less_is_expected_to_be_left(prefixes: Prefixes) -> None:
    policy = fresh(prefixes)
    prefixes.sent(HEAD, 102)
    policy.pick(ask(HEAD), FakeLoads(8))
    assert policy.tokens(ask(HEAD), 102) == 0
    for number in range(128 * 8):
        prefixes.sent(f"{number:08d}", 100)
    policy.pick(ask(HEAD), FakeLoads(8))
    assert policy.tokens(ask(HEAD), 102) == pytest.approx(len(HEAD) / 2, rel=0.02)
