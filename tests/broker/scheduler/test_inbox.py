"""Published load: the newest of each source, gaps counted, everything else refused."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import wire
from broker.errors import WireError
from broker.scheduler.events import Inbox
from broker.types import LoadReport, Trust

ONE, TWO = b"1" * 16, b"2" * 16
URL = "http://a:1"


def native(sequence: int, running: int, incarnation: bytes = ONE) -> list[bytes]:
    return [b"load", sequence.to_bytes(8, "big"), wire.encode(wire.Load(incarnation, running, 0))]


def sglang(sequence: int, running: int, rank: int = 0) -> list[bytes]:
    stat = ["LoadStat", running, 0, 10, 100, rank, 0, 10, 8, 0, 0, "and what later releases append"]
    return [b"load", sequence.to_bytes(8, "big"), msgspec.msgpack.encode(stat)]


def test_of_many_messages_the_newest_counts() -> None:
    inbox = Inbox()
    for sequence in range(5):
        inbox.hear(native(sequence, running=sequence), None)
        inbox.hear(native(sequence, running=10 + sequence, incarnation=TWO), None)
    assert inbox.take() == {ONE: LoadReport(running=4, waiting=0), TWO: LoadReport(running=14, waiting=0)}
    assert inbox.take() == {}
    assert inbox.missed == 0


def test_a_gap_is_counted_and_lowers_the_trust_of_what_shows_it() -> None:
    inbox = Inbox()
    inbox.hear(native(7, 1), None)
    assert inbox.take()[ONE].trust is Trust.EXACT
    inbox.hear(native(10, 1), None)
    assert (inbox.missed, inbox.take()[ONE].trust) == (2, Trust.APPROX)
    inbox.hear(native(11, 1), None)
    assert (inbox.missed, inbox.take()[ONE].trust) == (2, Trust.EXACT)


def test_a_publisher_that_starts_again_is_no_gap() -> None:
    inbox = Inbox()
    inbox.hear(sglang(500, 1), URL)
    inbox.hear(sglang(0, 2), URL)
    inbox.hear(sglang(1, 3), URL)
    assert inbox.missed == 0
    assert inbox.take()[URL].running == 3


def test_a_jump_beyond_reason_is_a_publisher_that_starts_again() -> None:
    """The count of what was missed is stored in 63 bits: one such number must not end the reading of all others."""
    inbox = Inbox()
    for sequence in (0, 2**64 - 1, 5, 2**63):
        inbox.hear(native(sequence, running=1), None)
    assert inbox.missed == 0
    assert inbox.take()[ONE] == LoadReport(running=1, waiting=0)


def test_the_ranks_of_an_instance_are_one_report() -> None:
    inbox = Inbox()
    inbox.hear(sglang(0, 2, rank=0), URL)
    inbox.hear(sglang(9, 5, rank=1), URL)
    inbox.hear(sglang(1, 3, rank=0), URL)
    assert inbox.take()[URL] == LoadReport(running=8, waiting=0, waiting_tokens=0, kv_permille=100, capacity=16)
    assert inbox.missed == 0


def test_ranks_are_bounded() -> None:
    inbox = Inbox()
    for rank in range(1000):
        inbox.hear(sglang(0, 1, rank=rank), URL)
    assert inbox.take()[URL].running == 64


def test_a_forgotten_instance_starts_afresh() -> None:
    inbox = Inbox()
    inbox.hear(sglang(5, 2, rank=0), URL)
    inbox.hear(sglang(5, 2, rank=1), URL)
    inbox.forget(URL)
    assert inbox.take() == {}
    inbox.hear(sglang(90, 1, rank=0), URL)
    assert (inbox.take()[URL].running, inbox.missed) == (1, 0)


def test_publishers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.scheduler.events.MOST_PUBLISHERS", 2)
    inbox = Inbox()
    for number in range(5):
        inbox.hear(native(1, 1, bytes([number]) * 16), None)
    inbox.hear(native(9, 1, bytes([4]) * 16), None)
    assert inbox.missed == 7
    inbox.hear(native(9, 1, bytes([0]) * 16), None)
    assert inbox.missed == 7


SEQUENCE = bytes(8)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"load"],
        [b"load", SEQUENCE],
        [b"load", SEQUENCE, b""],
        [b"load", b"short", wire.encode(wire.Load(ONE, 1, 1))],
        [b"kv", SEQUENCE, wire.encode(wire.Load(ONE, 1, 1))],
        [b"load", SEQUENCE, wire.encode(wire.Load(ONE, 1, 1)), b"extra"],
        [b"load", SEQUENCE, wire.encode(wire.Load(b"short", 1, 1))],
        [b"load", SEQUENCE, msgspec.msgpack.encode(["Load", ONE, "1", 1])],
        [b"load", SEQUENCE, msgspec.msgpack.encode(["Other", 1])],
        [b"load", SEQUENCE, msgspec.msgpack.encode({"a": 1})],
        [b"load", SEQUENCE, bytes(wire.MAX_CONTROL_BYTES + 1)],
        sglang(0, 1),
    ],
)
def test_what_is_no_load_is_refused(frames: list[bytes]) -> None:
    inbox = Inbox()
    with pytest.raises(WireError):
        inbox.hear(frames, None)
    assert inbox.take() == {}


@given(st.lists(st.binary(max_size=40), max_size=4), st.binary(max_size=40))
def test_garbage_is_refused_or_read_never_raised(frames: list[bytes], payload: bytes) -> None:
    inbox = Inbox()
    for message in (frames, [b"load", SEQUENCE, payload]):
        for url in (None, URL):
            with contextlib.suppress(WireError):
                inbox.hear(message, url)
