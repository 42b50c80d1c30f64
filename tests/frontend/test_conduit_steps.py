"""Of a step, the short way passes on what is the next piece of an answer that flows; the rest comes back in order.

`passed` says in Python what that is. See test_conduit.py.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import UNDECODABLE
from broker.wire import CHUNK, DONE, ERROR, STEP_TAG
from frontend import conduit
from frontend.upstream.zmq import _decode_step
from tests.frontend.conduits import EVENT, NOW, USAGE, Ends, framed, mutated, noted_of

if TYPE_CHECKING:
    from frontend._conduit import Conduit

if conduit.compiled is None:
    pytest.skip("it was not compiled here", allow_module_level=True)
short = conduit.compiled

LIFE = bytes(range(16))
IDS = (0, 1, 2, 127, 128, 255, 256, 70_000, 2**32, 2**64 - 1)
FLOWING = IDS[1::2]
Deltas = list[tuple[int, int, int, bytes]]


def number(value: int, least: int = 0) -> bytes:
    """In MessagePack, in at least so many bytes; 0: in the fewest."""
    if value < 128 and not least:
        return bytes((value,))
    width = next(width for width in range(4) if value < 1 << (8 << width) and 1 << width >= least)
    return bytes((0xCC + width,)) + value.to_bytes(1 << width, "big")


def array(length: int, least: int = 0) -> bytes:
    if length < 16 and not least:
        return bytes((0x90 + length,))
    return struct.pack(">BH", 0xDC, length) if least < 4 else struct.pack(">BI", 0xDD, length)


def binary(data: bytes, least: int = 0) -> bytes:
    width = next(width for width in range(3) if len(data) < 1 << (8 << width) and 1 << width >= least)
    return bytes((0xC4 + width,)) + len(data).to_bytes(1 << width, "big") + data


@st.composite
def steps(draw: st.DrawFn) -> bytes:
    """Most deltas are the next piece of an answer that flows; the rest is anything that an engine may say."""
    due = dict.fromkeys(IDS, 0)
    least = draw(st.sampled_from((0, 0, 1, 2, 4)))
    deltas = []
    for _ in range(draw(st.integers(0, 8))):
        ident = draw(st.sampled_from(FLOWING) | st.sampled_from(IDS))
        kind = draw(st.sampled_from((CHUNK,) * 8 + (DONE, ERROR, 3)))
        sequence = max(0, due[ident] + draw(st.sampled_from((0,) * 8 + (1, -1))))
        data = draw(st.sampled_from((EVENT, USAGE, b"data: x", b"", bytes(300))) | st.binary(max_size=20))
        due[ident] += 1
        fields = [number(ident, least), number(sequence, least), number(kind, least), binary(data, least)]
        if draw(st.integers(0, 20)) == 0:
            fields.append(number(429))
        deltas.append(array(len(fields), least) + b"".join(fields))
    tag = draw(st.sampled_from((STEP_TAG,) * 8 + (STEP_TAG - 1,)))
    life = draw(st.sampled_from((LIFE,) * 8 + (LIFE[:-1], LIFE[::-1])))
    behind = draw(st.sampled_from((b"",) * 8 + (b"\0",)))
    return (
        array(3, least)
        + number(tag, least)
        + binary(life, least)
        + array(len(deltas), least)
        + b"".join(deltas)
        + behind
    )


def plain(frame: bytes) -> Deltas | None:
    """The deltas of a step of this life, as the long way reads them."""
    try:
        tag, life, deltas = _decode_step(frame)
    except UNDECODABLE:
        return None
    return deltas if (tag, life) == (STEP_TAG, LIFE) else None


class Flow(Ends):
    """An answer that flows, as `step` and as the model have it."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        super().__init__(stack)
        self.due = 0
        self.sent: list[bytes] = []
        self.is_stuck = False

    def stick(self) -> None:
        super().stick()
        self.is_stuck = True


def table(flows: dict[int, Flow]) -> Any:
    conduits = short.Conduits()
    for ident, flow in flows.items():
        conduits.add(ident, flow.conduit)
    return conduits


def passed(deltas: Deltas, flows: dict[int, Flow]) -> tuple[Deltas, list[tuple[int, bytes]]]:
    """What comes back of a step, and takes its flow out of those given; what goes to clients is noted with them."""
    others, unsent = [], []
    for delta in deltas:
        ident, sequence, kind, data = delta
        flow = flows.get(ident)
        if flow is None or kind != CHUNK or sequence != flow.due or not data:
            others.append(delta)
            flows.pop(ident, None)
            continue
        flow.due += 1
        flow.sent.append(data)
        if flow.is_stuck:
            unsent.append((ident, framed(data)))
            del flows[ident]
    return others, unsent


@settings(max_examples=250)
@given(frame=steps(), stuck=st.sets(st.sampled_from(FLOWING), max_size=2), views=st.booleans())
def test_of_a_step_each_client_gets_what_is_its_and_the_rest_comes_back_in_order(
    frame: bytes, stuck: set[int], views: bool
) -> None:
    with contextlib.ExitStack() as stack:
        flows = {ident: Flow(stack) for ident in FLOWING}
        for ident in stuck:
            flows[ident].stick()
        conduits = table(flows)
        found = short.step(memoryview(frame) if views else frame, LIFE, conduits, NOW)
        deltas = plain(frame)
        if deltas is None:
            assert found is None
        else:
            left = flows.copy()
            others, unsent = passed(deltas, left)
            assert found == ((others, unsent) if others or unsent else ())
            assert len(conduits) == len(left)
        for flow in flows.values():
            assert flow.conduit.next == flow.due
            assert flow.noted == noted_of(flow.sent, flow.sent)
            if not flow.is_stuck:
                assert flow.read() == b"".join(map(framed, flow.sent))


@settings(max_examples=250)
@given(frame=mutated(steps()), end=st.none() | st.integers(0, 100))
def test_whatever_else_comes_is_left_alone_or_read_as_the_long_way_reads_it(frame: bytes, end: int | None) -> None:
    frame = frame[:end]
    with contextlib.ExitStack() as stack:
        flows = {ident: Flow(stack) for ident in FLOWING}
        found = short.step(frame, LIFE, table(flows), NOW)
        if found is not None:
            deltas = plain(frame)
            assert deltas is not None
            others, unsent = passed(deltas, flows.copy())
            assert found == ((others, unsent) if others or unsent else ())
        for flow in flows.values():
            assert flow.noted == noted_of(flow.sent, flow.sent)
            assert flow.read() == b"".join(map(framed, flow.sent))


@given(frame=st.binary(max_size=64) | st.lists(st.sampled_from(range(256))).map(bytes))
def test_noise_is_no_step(frame: bytes) -> None:
    assert short.step(frame, LIFE, short.Conduits(), NOW) is None


WRITERS: dict[str, Callable[[Any], bytes]] = {"msgpack": msgpack.packb, "msgspec": msgspec.msgpack.encode}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("size", [1, 255, 256, 4095, 65_000])
def test_steps_as_engines_libraries_write_them_are_plain(stack: contextlib.ExitStack, writer: str, size: int) -> None:
    ident = 2**33
    flow = Flow(stack)
    flow.conduit.next = 70_000
    data = b"x" * size
    frame = WRITERS[writer]([STEP_TAG, LIFE, [[n, 0, CHUNK, b"y"] for n in range(20)] + [[ident, 70_000, CHUNK, data]]])
    found = short.step(frame, LIFE, table({ident: flow}), NOW)
    assert found == ([(n, 0, CHUNK, b"y") for n in range(20)], [])
    assert flow.read() == framed(data)
    assert flow.conduit.next == 70_001


def test_a_step_that_claims_more_deltas_than_it_has_room_for_is_none() -> None:
    for length in (1, 2**16 - 1, 2**32 - 1):
        frame = array(3) + number(STEP_TAG) + binary(LIFE) + array(length, 4) + bytes(5)
        assert short.step(frame, LIFE, short.Conduits(), NOW) is None


def test_what_a_client_takes_in_part_stays_in_front_of_what_comes_behind_it(stack: contextlib.ExitStack) -> None:
    flow = Flow(stack)
    flow.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    large = bytes(range(256)) * 200
    frame = msgpack.packb([STEP_TAG, LIFE, [[7, 0, CHUNK, EVENT], [7, 1, CHUNK, large], [7, 2, CHUNK, EVENT]]])
    conduits = table({7: flow})
    others, ((ident, unsent),) = short.step(frame, LIFE, conduits, NOW)
    assert (others, ident, len(conduits)) == ([(7, 2, CHUNK, EVENT)], 7, 0)
    assert len(unsent) < len(framed(large))
    assert flow.read() + unsent == framed(EVENT) + framed(large)
    assert flow.conduit.next == 2


def test_after_close_nothing_is_written_to_whoever_has_the_descriptor_next(stack: contextlib.ExitStack) -> None:
    flow = Flow(stack)
    flow.conduit.close()
    frame = msgpack.packb([STEP_TAG, LIFE, [[7, 0, CHUNK, EVENT]]])
    assert short.step(frame, LIFE, table({7: flow}), NOW) == ()
    assert flow.read() == b""
    assert flow.noted == noted_of([EVENT], [EVENT])


def test_what_is_larger_than_a_read_is_left_to_the_transport(stack: contextlib.ExitStack) -> None:
    flow = Flow(stack)
    large = (7, 0, CHUNK, bytes(64 * 1024))
    assert short.step(msgpack.packb([STEP_TAG, LIFE, [large]]), LIFE, table({7: flow}), NOW) == ([large], [])
    assert flow.conduit.next == 0


def test_step_takes_a_frame_a_name_conduits_and_a_time() -> None:
    frame, conduits = msgpack.packb([STEP_TAG, LIFE, [[1, 0, CHUNK, b"x"]]]), short.Conduits()
    wrong: tuple[object, ...]
    for wrong in (("x", LIFE, conduits, NOW), (frame, "x", conduits, NOW), (frame, LIFE, {}, NOW)):
        with pytest.raises(TypeError):
            short.step(*wrong)
    with pytest.raises(TypeError):
        short.step(frame, LIFE, conduits, "x")


# -- the table of them ---------------------------------------------------------------------------------------


@given(
    ops=st.lists(
        st.tuples(st.booleans(), st.integers(0, 40) | st.sampled_from([16, 32, 48, 2**32, 2**64 - 1])), max_size=60
    )
)
def test_the_table_has_whom_it_was_given_and_has_not_lost(ops: list[tuple[bool, int]]) -> None:
    conduits, known = short.Conduits(), cast("dict[int, Conduit]", {})
    for adds, ident in ops:
        if adds:
            known[ident] = short.Conduit(-1)
            conduits.add(ident, known[ident])
        else:
            known.pop(ident, None)
            conduits.discard(ident)
        assert len(conduits) == len(known)
    everybody = sorted({ident for _, ident in ops} | {7})
    frame = msgpack.packb([STEP_TAG, LIFE, [[ident, 0, CHUNK, b"data: x\n\n"] for ident in everybody]])
    found = short.step(frame, LIFE, conduits, NOW)
    others = [(ident, 0, CHUNK, b"data: x\n\n") for ident in everybody if ident not in known]
    assert found == ((others, []) if others else ())
    assert all(conduit.events == 1 for conduit in known.values())


def test_the_table_takes_numbers_of_64_bits_and_conduits() -> None:
    conduits = short.Conduits()
    with pytest.raises(TypeError):
        conduits.add(1, "no conduit")
    with pytest.raises(TypeError):
        conduits.discard("1")
    with pytest.raises(OverflowError):
        conduits.discard(-1)
    conduits.discard(1)
    assert len(conduits) == 0


def test_the_table_keeps_conduits_alive_and_lets_them_go() -> None:
    conduits, one = short.Conduits(), short.Conduit(-1)
    before = sys.getrefcount(one)
    for number in range(100):
        conduits.add(number, one)
        conduits.add(number, one)
    assert sys.getrefcount(one) == before + 100
    for number in range(50):
        conduits.discard(number)
    assert sys.getrefcount(one) == before + 50
    del conduits
    assert sys.getrefcount(one) == before
