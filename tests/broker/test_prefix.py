"""The prefix index: keys of prompts, a frontend's half, the scheduler's half, and the way between them."""

from __future__ import annotations

from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import wire
from broker.errors import WireError
from broker.policies.prefix_cost import PrefixCost
from broker.prefix import PREFIX, PrefixIndex, PrefixWriter, create_prefix, prefix_layout
from broker.prefix.index import BATCH_BYTES, OUTBOX_BYTES, PENDING
from broker.prefix.keys import BLOCKS, alike, compiled, namespace, text_keys, token_keys
from broker.route import RouteRequest
from broker.wire import RoutingNotices
from shm.segment import Segment
from tests.support.loads import FakeLoads
from tests.support.twins import twin

__all__ = ["twin"]  # for every test of this file

SLOTS, FRONTENDS = 16, 3
START = namespace("m", 64, "text")
HEAD = "You are a helpful assistant. Answer in one sentence, and politely, whatever comes. " * 4
"""Five blocks of 64 characters and a little."""


class Shared:
    """One index, its scheduler's half and three frontends'."""

    def __init__(self, path: Path, slots: int = SLOTS, capacity: int = 4096) -> None:
        self.path = path
        self.layout = prefix_layout(slots, FRONTENDS, capacity)
        create_prefix(path, self.layout)
        self.generations = dict.fromkeys(range(slots), 1)
        self.writer = PrefixWriter.attach(path, self.layout, self.generations)
        self.frontends = [self.frontend(k) for k in range(FRONTENDS)]

    def frontend(self, index: int) -> PrefixIndex:
        return PrefixIndex.attach(self.path, self.layout, index)

    def deliver(self) -> int:
        counted = 0
        for frontend in self.frontends:
            while notices := frontend.batch():
                frame = wire.encode(notices)
                decoded = wire.decode(wire.from_frontend, frame)
                assert isinstance(decoded, RoutingNotices)
                counted += self.writer.apply(decoded)
        return counted

    def send(self, text: str, slot: int, frontend: int = 0) -> None:
        index = self.frontends[frontend]
        index.note(RouteRequest(prompt=text), slot)

    def depths(self, text: str, frontend: int = 0) -> dict[int, int]:
        depths = self.frontends[frontend].match(RouteRequest(prompt=text)).depths
        return {int(slot): int(depths[slot]) for slot in np.flatnonzero(depths)}


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    return Shared(tmp_path)


# -- keys --------------------------------------------------------------------------------------------------


def common(one: np.ndarray, other: np.ndarray) -> int:
    n = min(len(one), len(other))
    apart = np.flatnonzero(one[:n] != other[:n])
    return int(apart[0]) if len(apart) else n


letters = st.text(st.characters(), max_size=40)


@given(head=letters, one=letters, other=letters, block=st.integers(1, 9))
def test_keys_are_equal_exactly_as_far_as_the_full_blocks_are(head: str, one: str, other: str, block: int) -> None:
    a, b = head + one, head + other
    same = 0
    while a[same : same + block] == b[same : same + block] and same + block <= min(len(a), len(b)):
        same += block
    start = namespace("m", block, "text")
    assert common(text_keys(a, block, start), text_keys(b, block, start)) == same // block
    assert len(text_keys(a, block, start)) == len(a) // block


@given(a=st.lists(st.integers(0, 2**32 - 1), max_size=40), b=st.lists(st.integers(0, 3), max_size=40))
def test_token_keys_are_equal_exactly_as_far_as_the_full_blocks_are(a: list[int], b: list[int]) -> None:
    start = namespace("m", 4, "token")
    same = 0
    while a[same : same + 4] == b[same : same + 4] and same + 4 <= min(len(a), len(b)):
        same += 4
    assert common(token_keys(a, 4, start), token_keys(b, 4, start)) == same // 4


def test_a_prompt_in_ascii_and_one_that_goes_on_in_chinese_share_their_head() -> None:
    assert common(text_keys(HEAD + "x" * 64, 64, START), text_keys(HEAD + "你好" * 64, 64, START)) == len(HEAD) // 64


def test_half_an_emoji_is_a_character_like_any_other() -> None:
    assert len(text_keys("\ud83d" * 64, 64, START)) == 1


def test_differences_in_the_highest_byte_of_two_words_are_told_apart() -> None:
    """Two characters of a block, each the last of its eight: a plain weighted sum confuses one pair in 256."""
    blocks = ["aaaaaaa" + chr(33 + i) + "aaaaaaa" + chr(33 + j) + "a" * 48 for i in range(90) for j in range(90)]
    first = {int(text_keys(block, 64, START)[0]) for block in blocks}
    assert len(first) == len(blocks)


def test_repeated_words_that_differ_in_both_halves_alike_are_told_apart() -> None:
    """Words of four characters, as in numbered lists: folding one half of 64 bits over the other would cancel them."""
    blocks = [f"{i:04d}" * 8 + f"{j:04d}" * 8 for i in range(90) for j in range(90)]
    assert len({int(text_keys(block, 64, START)[0]) for block in blocks}) == len(blocks)


def test_buckets_of_any_text_are_filled_evenly() -> None:
    """The lowest bits choose the bucket. 8 in the mean, so 30 in one of 1,024 has a chance of 10^-9."""
    prompts = ["".join(f"{i:03d}{j:05d}" * 8 for j in range(128)) for i in range(64)]
    low = np.concatenate([text_keys(prompt, 64, START) for prompt in prompts]) & 1023
    assert np.bincount(low, minlength=1024).max() < 30


def test_blocks_in_another_order_have_other_keys() -> None:
    a, b = "a" * 64, "b" * 64
    assert text_keys(a + b, 64, START)[1] != text_keys(b + a, 64, START)[1]


def test_namespaces_keep_models_sizes_and_kinds_apart() -> None:
    starts = {int(namespace(m, b, k)) for m in ("", "a", "b") for b in (16, 64) for k in ("text", "token")}
    assert len(starts) == 12


def test_a_prompt_counts_up_to_its_cap() -> None:
    assert len(text_keys("x" * (BLOCKS + 5) * 64, 64, START)) == BLOCKS
    assert len(text_keys("x" * 640, 64, START, limit=3)) == 3
    assert len(text_keys("x" * 40_000, 5000, START)) == 8


def test_keys_are_the_same_in_every_process_and_version() -> None:
    """A change of the hash is a change of the layout: old and new frontends may share one index for a while."""
    assert text_keys("x" * 128, 64, START).tolist() == [-5714482555872684850, -4285977973691084249]
    assert token_keys([1, 2, 3, 4], 2, START).tolist() == [-7552543605295928840, -5079778827109150454]


anything = st.text(st.one_of(st.characters(max_codepoint=127), st.characters(), st.sampled_from("é你\U0001f600\ud83d")))


@given(text=anything, block=st.integers(1, 70), limit=st.integers(0, 9), start=st.integers(0, 2**64 - 1))
def test_the_twins_make_the_same_keys(text: str, block: int, limit: int, start: int) -> None:
    text *= 9
    with mock.patch("broker.prefix.keys.compiled", None):
        expected = text_keys(text, block, start, limit).tolist()
    assert text_keys(text, block, start, limit).tolist() == expected


@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1)), block=st.integers(1, 9), start=st.integers(0, 2**64 - 1))
def test_the_twins_make_the_same_keys_of_ids(ids: list[int], block: int, start: int) -> None:
    with mock.patch("broker.prefix.keys.compiled", None):
        expected = token_keys(ids, block, start).tolist()
    assert token_keys(ids, block, start).tolist() == expected


some_keys = st.lists(st.integers(-3, 3), max_size=70)


@given(head=some_keys, one=some_keys, other=some_keys)
def test_alike_are_leading_keys_up_to_the_first_that_differs(head: list[int], one: list[int], other: list[int]) -> None:
    a, b = np.array(head + one, dtype=np.int64), np.array(head + other, dtype=np.int64)
    assert alike(a, b) == common(a, b)


def test_the_compiled_twin_reads_nothing_that_is_not_there(twin: str) -> None:
    if twin == "python":
        return
    keys, one, none = np.empty(2, dtype=np.int64), bytes(64), b""
    for text, places, narrow, wide in (
        ("x" * 127, one, one, bytes(256)),
        ("x" * 128, none, one, bytes(256)),
        ("x" * 128, one, none, bytes(256)),
        ("x" * 128, one, one, bytes(248)),
    ):
        with pytest.raises(ValueError, match="few"):
            compiled.text_keys(64, 0, places, keys, text, narrow, one, wide, bytes(256))
    with pytest.raises(ValueError, match="few"):
        compiled.token_keys(4, 0, one, keys, np.zeros(7, dtype=np.int64), one, one)
    with pytest.raises(ValueError, match="no block"):
        compiled.token_keys(0, 0, one, keys, np.zeros(8, dtype=np.int64), one, one)
    with pytest.raises(TypeError):
        compiled.text_keys(64, 0, one, keys, b"x" * 128, one, one, one, one)


# -- frontends ---------------------------------------------------------------------------------------------


def test_a_frontend_sees_its_own_notice_at_once_and_others_after_delivery(shared: Shared) -> None:
    shared.send(HEAD, 3)
    assert shared.depths(HEAD) == {3: 5}
    assert shared.depths(HEAD, frontend=1) == {}
    assert shared.deliver() == 1
    assert shared.depths(HEAD) == shared.depths(HEAD, frontend=1) == {3: 5}


def test_depths_are_leading_blocks_by_slot(shared: Shared) -> None:
    shared.send(HEAD[:128] + "other" * 20, 1)
    shared.send(HEAD + "x" * 100, 2)
    shared.deliver()
    shared.send(HEAD[:192], 4)
    assert shared.depths(HEAD) == {1: 2, 2: 5, 4: 3}


def test_of_few_slots_alone_the_depths_are_the_same(shared: Shared) -> None:
    shared.send(HEAD[:128] + "other" * 20, 1)
    shared.send(HEAD + "x" * 100, 2)
    shared.deliver()
    shared.send(HEAD[:192], 4)
    shared.send(HEAD[:192], 2)
    index = shared.frontends[0]
    every = index.match(RouteRequest(prompt=HEAD)).depths
    for slots in ((), (4,), (2, 0, 1), (4, 3, 2, 1)):
        assert index.depths(index.prompt(RouteRequest(prompt=HEAD)), slots) == [every[slot] for slot in slots]
    assert index.depths(index.prompt(RouteRequest(prompt="short")), (1, 2)) == [0, 0]


def test_own_and_shared_knowledge_of_a_slot_count_as_the_deeper_one(shared: Shared) -> None:
    shared.send(HEAD, 3)
    shared.deliver()
    shared.send(HEAD[:128], 3)
    assert shared.depths(HEAD) == {3: 5}


def test_uses_count_own_and_delivered_requests_once(shared: Shared) -> None:
    for _ in range(4):
        shared.send(HEAD, 3)
    shared.deliver()
    for _ in range(3):
        shared.send(HEAD[:128], 3)
    shared.send("y" * 640, 3)
    match = shared.frontends[0].match(RouteRequest(prompt=HEAD))
    assert match.uses(np.arange(5)).tolist() == pytest.approx([7, 7, 4, 4, 4], rel=0.01)
    assert match.requests == pytest.approx(8, rel=0.01)


def test_token_prompts_text_prompts_and_models_do_not_meet(shared: Shared) -> None:
    index = shared.frontends[0]
    requests = [
        RouteRequest(prompt=HEAD),
        RouteRequest(prompt=HEAD, model="a"),
        RouteRequest(prompt_ids=[ord(c) for c in HEAD]),
    ]
    for slot, request in enumerate(requests):
        index.note(request, slot)
    for slot, request in enumerate(requests):
        assert np.flatnonzero(index.match(request).depths).tolist() == [slot]


LONG = "".join(f"{i:064d}" for i in range(40))
"""Of 40 blocks."""


class Teller:
    """A frontend whose uses are not counted, and what it says to the scheduler."""

    def __init__(self, shared: Shared) -> None:
        self.now = 0.0
        self.shared = shared
        segment = Segment.attach(shared.path / PREFIX, shared.layout)
        self.index = PrefixIndex(segment, 0, limit=64, repeat_s=60.0, clock=lambda: self.now)

    def send(self, text: str, slot: int, *, lost: bool = False) -> int:
        """Returns how many blocks were told."""
        request = RouteRequest(prompt=text)
        self.index.match(request)
        self.index.tell(request, slot)
        notices = self.index.batch()
        if notices is None:
            return 0
        if not lost:
            self.shared.writer.apply(notices)
        return len(notices.keys) // 8


def test_what_was_told_of_late_is_not_told_again(shared: Shared) -> None:
    teller = Teller(shared)
    assert teller.send(LONG, 3) == 40
    assert teller.send(LONG, 3) == 0
    assert teller.send(LONG, 4) == 40
    assert shared.depths(LONG, frontend=1) == {3: 40, 4: 40}


def test_of_a_prompt_that_goes_on_only_the_rest_is_told(shared: Shared) -> None:
    teller = Teller(shared)
    teller.send(LONG, 3)
    assert teller.send(LONG + "x" * 640, 3) == 50 - 32
    assert teller.send(LONG[:1600] + "y" * 640, 3) == 35 - 16
    assert shared.depths(LONG + "x" * 640, frontend=1) == {3: 50}
    assert shared.depths(LONG[:1600] + "y" * 640, frontend=1) == {3: 35}


def test_what_was_told_is_known_from_the_choice_or_looked_up(shared: Shared) -> None:
    """After a choice among many, among few, or at another time."""
    teller, other = Teller(shared), RouteRequest(prompt="z" * 64)
    index, request = teller.index, RouteRequest(prompt=LONG)
    assert teller.send(LONG, 3) == 40
    index.depths(index.prompt(request), (2, 3))
    index.tell(request, 3)
    assert index.batch() is None
    index.prompt(other)
    index.tell(request, 3)
    assert index.batch() is None


def test_what_was_told_and_got_lost_is_told_again(shared: Shared) -> None:
    teller = Teller(shared)
    assert teller.send(LONG, 3, lost=True) == 40
    teller.send("z" * 640, 4)  # from here on it is not expected to arrive
    assert teller.send(LONG, 3) == 40
    teller.shared.writer.forget([3])
    teller.shared.writer.admit(3, 1)
    assert teller.send(LONG, 3) == 40


def test_what_is_in_use_is_told_again_before_it_looks_old(shared: Shared) -> None:
    teller = Teller(shared)
    teller.send(LONG, 3)
    teller.now = 59.0
    assert teller.send(LONG, 3) == 0
    teller.now = 60.0
    assert teller.send(LONG, 3) == 40
    for number in range(4096 // 8 // 64):  # an eighth of the table goes to others
        assert teller.send(LONG, 3) == 0
        shared.send(f"x{number:063d}" * 64, 5)
        shared.deliver()
    assert teller.send(LONG, 3) == 40


def test_what_is_remembered_as_told_is_bounded(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.prefix.index.TOLD", 100)
    teller = Teller(shared)
    for number in range(300):
        teller.index.tell(RouteRequest(prompt=f"{number:064d}" * 40), number % 4)
        assert sum(len(keys) for keys in teller.index._told._keys.values()) <= 103


def test_a_prompt_shorter_than_a_block_is_known_to_nobody_and_noted_nowhere(shared: Shared) -> None:
    shared.send("hello", 1)
    assert shared.frontends[0].batch() is None
    assert shared.depths("hello") == {}


def test_a_frontend_that_nobody_listens_to_keeps_a_bounded_past(shared: Shared) -> None:
    index = shared.frontends[0]
    for i in range(4 * PENDING):
        shared.send(f"{i:064d}" * 40, i % SLOTS)
    assert len(index._pending) == PENDING
    assert index._outbox_keys * 8 <= OUTBOX_BYTES
    for i in range(8000):
        shared.send(f"{i:064d}" * 40, i % SLOTS)
    assert index.lost > 0
    assert index._outbox_keys * 8 <= OUTBOX_BYTES


def test_batches_fit_their_message_and_hold_everything(shared: Shared) -> None:
    for i in range(30):
        shared.send(f"{i:064d}" * 900, i % SLOTS)
    sizes = []
    while notices := shared.frontends[0].batch():
        sizes.append(len(notices.keys))
        assert len(wire.encode(notices)) <= wire.MAX_CONTROL_BYTES
        shared.writer.apply(notices)
    assert max(sizes) <= BATCH_BYTES
    assert sum(sizes) == 30 * 900 * 8
    assert not shared.frontends[0]._pending or shared.depths(f"{29:064d}" * 900) == {29 % SLOTS: 900}


def test_a_lost_batch_is_forgotten_with_the_next_one(shared: Shared) -> None:
    shared.send(HEAD, 3)
    assert shared.frontends[0].batch() is not None  # lost on its way
    shared.send("z" * 640, 4)
    shared.deliver()
    assert shared.depths(HEAD) == {}
    assert shared.depths("z" * 640) == {4: 10}


def test_a_new_frontend_in_an_old_row_goes_on_counting(shared: Shared) -> None:
    shared.send(HEAD, 3)
    shared.deliver()
    shared.frontends[0] = shared.frontend(0)
    shared.send("z" * 640, 4)
    assert shared.depths("z" * 640) == {4: 10}
    shared.deliver()
    assert shared.depths("z" * 640, frontend=1) == {4: 10}


# -- the scheduler -----------------------------------------------------------------------------------------


def test_a_removed_instance_is_forgotten_and_its_late_notices_too(shared: Shared) -> None:
    shared.send(HEAD, 3)
    shared.send(HEAD, 4)
    shared.deliver()
    shared.send(HEAD, 3, frontend=1)
    shared.writer.forget([3])
    assert shared.depths(HEAD) == shared.depths(HEAD, frontend=1) == {4: 5}
    shared.writer.admit(3, 2)
    assert shared.deliver() == 0
    assert shared.depths(HEAD) == {4: 5}


def test_the_next_scheduler_keeps_what_is_still_true(shared: Shared) -> None:
    for slot in (3, 4, 5):
        shared.send(HEAD, slot)
    shared.deliver()
    generations = {**shared.generations, 4: 2}
    del generations[5]
    shared.writer = PrefixWriter.attach(shared.path, shared.layout, generations)
    assert shared.depths(HEAD) == {3: 5}
    shared.send(HEAD, 4)
    assert shared.deliver() == 1
    assert shared.depths(HEAD) == {3: 5, 4: 5}


def test_a_scheduler_killed_while_it_forgets_leaves_nothing_to_the_next_instance(shared: Shared) -> None:
    shared.send(HEAD, 3)
    shared.deliver()
    shared.writer.forgetting([3])
    next(shared.writer.forgetting([3]))  # and dies within the pass: the set has lost its member, or not
    shared.writer._table.add(text_keys(HEAD, 64, namespace("", 64, "text")), 3, 9)
    del shared.generations[3]
    successor = PrefixWriter.attach(shared.path, shared.layout, shared.generations)
    successor.admit(3, 2)
    assert shared.depths(HEAD) == {}


def test_admitting_the_same_generation_again_forgets_nothing(shared: Shared) -> None:
    shared.send(HEAD, 3)
    shared.deliver()
    shared.writer.admit(3, 1)
    assert shared.depths(HEAD) == {3: 5}


def test_what_is_not_used_any_more_ages_out(shared: Shared) -> None:
    shared.send(HEAD, 3)
    shared.deliver()
    assert shared.writer.age(100.0, 60.0) == 0
    shared.send("z" * 640, 4)
    shared.deliver()
    assert shared.writer.age(150.0, 60.0) == 0
    assert shared.writer.age(160.0, 60.0) == 5
    assert shared.depths(HEAD) == {}
    assert shared.depths("z" * 640) == {4: 10}
    assert shared.writer.age(215.0, 60.0) == 10
    assert len(shared.writer) == 0


@pytest.mark.parametrize(
    "notices",
    [
        RoutingNotices(0, 1, [1], [1], [2], b"\x01" * 8),
        RoutingNotices(0, 1, [1], [1], [1], b"\x01" * 9),
        RoutingNotices(0, 1, [1, 2], [1], [1], b"\x01" * 8),
        RoutingNotices(0, 1, [SLOTS], [1], [1], b"\x01" * 8),
        RoutingNotices(0, 1, [-1], [1], [1], b"\x01" * 8),
        RoutingNotices(0, 1, [1, 1], [1, 1], [2, -1], b"\x01" * 8),
        RoutingNotices(0, 1, [1], [1], [1], bytes(8)),
    ],
)
def test_notices_that_contradict_themselves_are_refused_whole(shared: Shared, notices: RoutingNotices) -> None:
    with pytest.raises(WireError):
        shared.writer.apply(notices)
    assert len(shared.writer) == 0


@pytest.mark.parametrize("count", [20_000, pytest.param(300_000, marks=pytest.mark.stress)])
def test_any_number_of_distinct_prompts_leaves_memory_flat(tmp_path: Path, count: int) -> None:
    """FastDeploy's router dead-locks for good at 200,000 nodes. The whole way, from a choice to its notice applied."""
    shared = Shared(tmp_path, capacity=4096)
    size = (tmp_path / PREFIX).stat().st_size
    index = shared.frontends[0]
    policy = PrefixCost(Random(1), index)
    view = FakeLoads(SLOTS)
    view.slots = np.arange(SLOTS, dtype=np.int64)
    for number in range(count):
        request = RouteRequest(prompt=f"{number:064d}" * 3, prompt_tokens=48)
        slot = policy.pick(request, view)
        policy.placed(request, slot)
        if number % 10 == 0:
            shared.deliver()
        assert index.match(request).depths[slot] == 3
    shared.deliver()
    assert len(shared.writer) <= 4096
    assert (tmp_path / PREFIX).stat().st_size == size
    assert not index._outbox
    assert len(index._pending) <= PENDING
