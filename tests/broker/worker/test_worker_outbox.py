"""One message per step, order kept, nothing lost while a socket takes no more."""

from __future__ import annotations

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from broker.worker.outbox import STEP_BYTES, Delta, Outbox

INCARNATION = bytes(range(16, 32))


class Socket:
    """Takes `room` messages, then refuses."""

    def __init__(self, room: int = 10**9) -> None:
        self.room = room
        self.taken: list[bytes] = []

    def __call__(self, message: bytes) -> bool:
        if len(self.taken) >= self.room:
            return False
        self.taken.append(message)
        return True

    @property
    def deltas(self) -> list[list[object]]:
        return [delta for message in self.taken for delta in msgpack.unpackb(message)[2]]


def test_the_deltas_of_a_step_leave_as_one_message() -> None:
    outbox, socket = Outbox(INCARNATION), Socket()
    outbox.put((1, 0, 0, b"a"))
    outbox.put((2, 7, 1, b""))
    outbox.put((3, 0, 2, b"{}", 429))
    assert outbox.flush(socket)
    assert [msgpack.unpackb(m) for m in socket.taken] == [
        [82, INCARNATION, [[1, 0, 0, b"a"], [2, 7, 1, b""], [3, 0, 2, b"{}", 429]]]
    ]
    assert outbox.is_empty
    assert outbox.held_bytes == 0


def test_nothing_gathered_sends_nothing() -> None:
    socket = Socket()
    assert Outbox(INCARNATION).flush(socket)
    assert socket.taken == []


def test_a_step_is_closed_at_its_size_and_one_delta_more_begins_the_next() -> None:
    outbox, socket = Outbox(INCARNATION), Socket()
    for sequence in range(3):
        outbox.put((1, sequence, 0, b"x" * (STEP_BYTES // 2)))
    outbox.flush(socket)
    assert [len(msgpack.unpackb(m)[2]) for m in socket.taken] == [2, 1]


def test_clear_forgets_what_was_refused_and_what_was_gathered() -> None:
    outbox, socket = Outbox(INCARNATION), Socket(room=0)
    outbox.put((1, 0, 0, b"a"))
    assert not outbox.flush(socket)
    outbox.put((1, 1, 0, b"b"))
    outbox.clear()
    assert outbox.is_empty
    assert outbox.held_bytes == 0


@given(st.lists(st.tuples(st.lists(st.binary(max_size=20), max_size=4), st.integers(0, 3)), max_size=20))
def test_order_survives_any_refusals(turns: list[tuple[list[bytes], int]]) -> None:
    outbox, socket = Outbox(INCARNATION), Socket(room=0)
    put: list[Delta] = []
    for pieces, room in turns:
        for piece in pieces:
            delta = (1, len(put), 0, piece)
            put.append(delta)
            outbox.put(delta)
        socket.room = len(socket.taken) + room
        emptied = outbox.flush(socket)
        assert emptied == outbox.is_empty
    socket.room = 10**9
    assert outbox.flush(socket)
    assert socket.deltas == [list(delta) for delta in put]
