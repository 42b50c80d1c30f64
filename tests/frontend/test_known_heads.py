"""A head is known only if it is the one that was learned, to the last byte but the digits of its length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend.known_heads import MOST, MOST_BYTES, KnownHeads

LINES = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nAccept: */*\r\n\r\n"
HEADERS = 3
LOWER = LINES.replace(b"Content-Length", b"content-length")


def message(size: int, lines: bytes = LINES) -> bytes:
    return lines % size + b"b" * size


def heads(*learned: tuple[bytes, str]) -> KnownHeads[str]:
    known: KnownHeads[str] = KnownHeads()
    for lines, name in learned:
        known.learn(message(5, lines), HEADERS, name)
    return known


@pytest.mark.parametrize("lines", [LINES, LOWER])
@pytest.mark.parametrize("size", [1, 5, 12, 100_000])
def test_a_head_is_known_whatever_the_length_of_its_body(lines: bytes, size: int) -> None:
    known = heads((lines, "it"))
    for _ in range(2):  # by its bytes, and as the one known last
        assert known.whole(message(size, lines)) == ("it", b"b" * size)


def test_several_heads_are_told_apart_in_any_order() -> None:
    other = LINES.replace(b"*/*", b"a/*")
    known = heads((LINES, "one"), (other, "two"))
    for lines, name in ((LINES, "one"), (other, "two"), (other, "two"), (LINES, "one")):
        assert known.whole(message(7, lines)) == (name, b"b" * 7)


@pytest.mark.parametrize("warm", [False, True])
def test_less_or_more_than_one_message_is_not_known(warm: bool) -> None:
    """Also where the cut is within the blank line, and the rest is as long as the digits say."""
    for size in (5, 70, len(LINES % 70) - 3, len(LINES % 70) - 4):
        known = heads((LINES, "it"))
        if warm:
            known.whole(message(5))
        whole = message(size)
        assert all(known.whole(whole[:cut]) is None for cut in range(len(whole)))
        assert known.whole(whole + b"b") is None
        assert known.whole(whole + whole) is None
        assert known.whole(whole) is not None


@pytest.mark.parametrize(
    "digits", [b"+5", b" 5", b"5 ", b"0x5", b"5_", b"", b"-5", b"5;", b"\xd9\xa5", b"0" * 5000 + b"5"]
)
def test_only_digits_are_a_length(digits: bytes) -> None:
    known = heads((LINES, "it"))
    for _ in range(2):
        assert known.whole((LINES % 5).replace(b": 5\r", b": " + digits + b"\r") + b"b" * 5) is None
        assert known.whole(message(5)) is not None


@given(at=st.integers(0, len(LINES % 5) - 1), byte=st.integers(0, 255), warm=st.booleans())
def test_one_other_byte_makes_another_head(at: int, byte: int, warm: bool) -> None:
    known = heads((LINES, "it"))
    if warm:
        known.whole(message(5))
    data = bytearray(message(5))
    data[at] = byte
    found = known.whole(bytes(data))
    assert (found is not None) == (bytes(data) == message(5))


@pytest.mark.parametrize(
    ("lines", "headers"),
    [
        pytest.param(LINES.replace(b"\r\n", b"\n"), HEADERS, id="other line ends"),
        pytest.param(LINES.replace(b"Host: x\r\n", b"Host: x\n"), HEADERS, id="one other line end"),
        pytest.param(LINES.replace(b"Host: x\r\n", b"Host: x\r\n y\r\n"), HEADERS, id="a folded line"),
        pytest.param(LINES, HEADERS + 1, id="the parser saw more"),
        pytest.param(b"\r\n" + LINES, HEADERS, id="an empty line in front"),
        pytest.param(LINES.replace(b"Content-Length: %d\r\n", b"") + b"%d", HEADERS - 1, id="no length"),
        pytest.param(LINES.replace(b"*/*", b"a" * MOST_BYTES), HEADERS, id="too long"),
    ],
)
def test_a_head_in_doubt_is_not_learned(lines: bytes, headers: int) -> None:
    known: KnownHeads[str] = KnownHeads()
    known.learn(message(5, lines), headers, "it")
    assert not len(known)


def test_the_oldest_goes_when_there_are_too_many() -> None:
    known: KnownHeads[str] = KnownHeads()
    for i in range(MOST + 1):
        known.learn(message(5, LINES.replace(b"Host: x", b"Host: %d" % i)), HEADERS, str(i))
    assert len(known) == MOST
    assert known.whole(message(5, LINES.replace(b"Host: x", b"Host: 0"))) is None
    assert known.whole(message(5, LINES.replace(b"Host: x", b"Host: 1"))) == ("1", b"b" * 5)
