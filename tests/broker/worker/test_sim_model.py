"""The rules of the timing model, in virtual time."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.worker.sim.model import Model, Speeds, Step, TooLong

SMALL = Speeds(batch=4, prefill_chunk=32, kv_blocks=24, block_size=4)


def run(model: Model, now: float = 0.0, most: int = 10_000) -> list[Step]:
    """Steps until there is nothing to do."""
    steps = []
    while (step := model.step(now)) is not None:
        steps.append(step)
        now = step.ends
        assert len(steps) < most, "the model does not come to rest"
    return steps


# A few token values, so that prefixes are shared by chance.
prompts = st.lists(st.integers(0, 2), min_size=1, max_size=40)
requests = st.lists(st.tuples(prompts, st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=25)


class Watched:
    """Drives a model through arrivals and aborts and checks its invariants at each step."""

    def __init__(self, speeds: Speeds) -> None:
        self.model = Model(speeds)
        self.stored: set[int] = set()
        self.steps: list[Step] = []

    def step(self, now: float) -> Step | None:
        step = self.model.step(now)
        cache = self.model.cache
        assert 0 <= cache.used <= cache.occupied <= cache.capacity
        assert self.model.running <= self.model.speeds.batch
        if step is not None:
            self.steps.append(step)
            for event in step.events:
                self._apply(event)
        return step

    def _apply(self, event: dict[str, object]) -> None:
        hashes = event["block_hashes"]
        assert isinstance(hashes, list)
        if event["type"] == "BlockStored":
            tokens = event["token_ids"]
            assert isinstance(tokens, list)
            assert len(tokens) == len(hashes) * self.model.speeds.block_size
            parent = event["parent_block_hash"]
            assert parent is None or parent in self.stored, "a block's parent is known when it is stored"
            assert not self.stored & set(hashes), "no block is stored twice"
            self.stored |= set(hashes)
        else:
            assert event["type"] == "BlockRemoved"
            assert self.stored >= set(hashes), "only what is stored is removed"
            self.stored -= set(hashes)


@given(requests)
def test_every_request_produces_exactly_its_tokens_and_nothing_is_left(
    arrivals: list[tuple[list[int], int, int]],
) -> None:
    watched = Watched(SMALL)
    model, now = watched.model, 0.0
    for id, (prompt, length, steps_before) in enumerate(arrivals):
        for _ in range(steps_before):
            step = watched.step(now)
            now = step.ends if step is not None else now
        model.submit(id, prompt, range(1000 * id, 1000 * id + length), now)
    while (step := watched.step(now)) is not None:
        now = step.ends
    produced = Counter(id for step in watched.steps for id in step.produced)
    assert produced == {id: length for id, (_, length, _) in enumerate(arrivals)}
    finished = [id for step in watched.steps for id in step.finished]
    assert sorted(finished) == list(range(len(arrivals)))
    assert (model.running, model.waiting, model.waiting_tokens, model.cache.used) == (0, 0, 0, 0)


@given(requests)
def test_admission_is_first_come_first_served(arrivals: list[tuple[list[int], int, int]]) -> None:
    model = Model(SMALL)
    for id, (prompt, length, _) in enumerate(arrivals):
        model.submit(id, prompt, range(length), 0.0)
    assert [id for step in run(model) for id in step.admitted] == list(range(len(arrivals)))


@given(requests, st.lists(st.tuples(st.integers(0, 24), st.integers(0, 20)), max_size=10))
def test_aborts_leave_no_block_behind(
    arrivals: list[tuple[list[int], int, int]], aborts: list[tuple[int, int]]
) -> None:
    watched = Watched(SMALL)
    model, now = watched.model, 0.0
    for id, (prompt, length, _) in enumerate(arrivals):
        model.submit(id, prompt, range(length), now)
    for id, steps in aborts:
        for _ in range(steps):
            step = watched.step(now)
            now = step.ends if step is not None else now
        model.abort(id)
    aborted = {id for id, _ in aborts}
    while (step := watched.step(now)) is not None:
        assert not aborted & set(step.produced)
        now = step.ends
    assert (model.running, model.waiting, model.waiting_tokens, model.cache.used) == (0, 0, 0, 0)


def test_a_cached_prefix_makes_the_first_token_come_sooner() -> None:
    speeds = Speeds(prefill_chunk=4096, block_size=16)
    prompt = list(range(1600))
    model = Model(speeds)
    model.submit(1, prompt, range(1), 0.0)
    (cold,) = run(model)
    model.submit(2, [*prompt, 7, 7], range(1), 0.0)
    (warm,) = run(model)
    assert cold.ends == pytest.approx(speeds.step_s + speeds.sequence_s + 1600 / 10_000)
    assert warm.ends == pytest.approx(speeds.step_s + speeds.sequence_s + 2 / 10_000)


def test_the_last_prompt_token_is_computed_even_if_all_is_cached() -> None:
    model = Model(Speeds(block_size=16))
    for id in (1, 2):
        model.submit(id, list(range(32)), range(1), 0.0)
        run(model)
    assert model.cached_tokens == 16


def test_generated_tokens_are_cached_for_the_next_turn() -> None:
    model = Model(Speeds(block_size=4))
    model.submit(1, [1, 2, 3, 4], range(100, 109), 0.0)
    run(model)
    model.submit(2, [1, 2, 3, 4, *range(100, 109), 9], range(1), 0.0)
    run(model)
    assert model.cached_tokens == 12, "the block of the prompt and both full blocks of the output"


def test_prompts_share_the_chunk_oldest_first() -> None:
    model = Model(Speeds(prefill_chunk=100))
    for id in (1, 2):
        model.submit(id, [id] * 80, range(1), 0.0)
    first, second = run(model)
    assert first.finished == [1]
    assert second.finished == [2]


def test_decoding_goes_on_while_a_long_prompt_is_computed() -> None:
    model = Model(Speeds(prefill_chunk=10))
    model.submit(1, [1], range(20), 0.0)
    step = model.step(0.0)
    assert step is not None
    model.submit(2, [2] * 100, range(1), step.ends)
    later = [model.step(0.0) for _ in range(5)]
    assert [s.produced for s in later if s is not None] == [[1]] * 5


def test_a_step_costs_more_with_more_sequences() -> None:
    speeds = Speeds()
    ends = []
    for sequences in (1, 64):
        model = Model(speeds)
        for id in range(sequences):
            model.submit(id, [id], range(2), 0.0)
        run_steps = run(model)
        ends.append(run_steps[1].ends - run_steps[1].begins)
    assert ends[1] - ends[0] == pytest.approx(63 * speeds.sequence_s)


def test_nobody_overtakes_a_request_that_does_not_fit_yet() -> None:
    model = Model(Speeds(kv_blocks=10, block_size=4))
    model.submit(1, [1] * 20, range(8), 0.0)  # 7 blocks
    model.submit(2, [2] * 20, range(8), 0.0)  # 7 more: must wait
    model.submit(3, [3], range(1), 0.0)  # 1: would fit
    assert [list(step.admitted) for step in run(model) if step.admitted] == [[1], [2, 3]]


def test_a_request_larger_than_the_cache_is_refused() -> None:
    model = Model(Speeds(kv_blocks=2, block_size=4))
    with pytest.raises(TooLong, match="9 tokens do not fit 2 blocks"):
        model.submit(1, [1] * 8, range(1), 0.0)


def test_the_least_recently_used_prefix_is_evicted_tail_first() -> None:
    model = Model(Speeds(kv_blocks=4, block_size=4))
    model.submit(1, [1] * 12, range(1), 0.0)
    (stored,) = [e for step in run(model) for e in step.events]
    model.submit(2, [2] * 7, range(1), 0.0)
    removed = [e["block_hashes"] for step in run(model) for e in step.events if e["type"] == "BlockRemoved"]
    assert removed == [[stored["block_hashes"][2]]]


def test_events_have_vllms_map_form() -> None:
    model = Model(Speeds(block_size=2))
    model.submit(1, [5, 6, 7, 8], range(1), 0.0)
    (event,) = [e for step in run(model) for e in step.events]
    hashes = event.pop("block_hashes")
    assert len(hashes) == 2
    assert all(0 <= h < 2**64 for h in hashes)
    assert event == {
        "type": "BlockStored",
        "parent_block_hash": None,
        "token_ids": [5, 6, 7, 8],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }


def test_equal_prompts_at_the_same_time_are_stored_once_and_shared() -> None:
    watched = Watched(Speeds(block_size=4))
    for id in (1, 2):
        watched.model.submit(id, [1] * 9, range(4), 0.0)
    now = 0.0
    while (step := watched.step(now)) is not None:
        now = step.ends
    assert len(watched.stored) == 3  # two of the prompt, one with the same generated tokens
