"""The short way passes on chunks that are whole beyond doubt, and hands back everything else untouched.

What it takes for such, `whole_chunks` says in Python. Steps of native engines: test_conduit_steps.py. How whole
frontends fare with it, at every turn of a stream's life: test_flowing.py.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import select
import socket
import struct
import weakref
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend import conduit
from tests.frontend.conduits import EVENT, NOW, USAGE, Ends, Noted, framed, mutated, noted_of, whole_chunks

if conduit.compiled is None:
    pytest.skip("it was not compiled here", allow_module_level=True)
short = conduit.compiled


class Line(Ends):
    """A stream: its engine's end, and its client's."""

    def __init__(self, stack: contextlib.ExitStack, intake: Any) -> None:
        super().__init__(stack)
        self.engine, self.socket = (stack.enter_context(end) for end in socket.socketpair())
        assert intake.join(self.conduit, self.socket.fileno(), self)


def noted_after(reads: list[bytes]) -> Noted:
    """After these reads, all of them whole chunks."""
    return noted_of(reads, [body for read in reads for body in whole_chunks(read) or ()])


def written(data: bytes, digits: int, how: str) -> bytes:
    """A chunk, with a size of at least so many digits, or something near one."""
    line = b"%0*x" % (digits, len(data))
    return {
        "capitals": b"%b\r\n%b\r\n" % (line.upper(), data),
        "extended": b"%b;a=b\r\n%b\r\n" % (line, data),
        "line feeds": b"%b\n%b\n" % (line, data),
        "turned ends": b"%b\n\r%b\r\n" % (line, data),
        "torn off": b"%b\r\n%b\r" % (line, data),
        "too long": b"%b\r\n%bx\r\n" % (line, data),
        "a sign": b"+%b\r\n%b\r\n" % (line, data),
        "a prefix": b"0x%b\r\n%b\r\n" % (line, data),
        "a blank": b"%b \r\n%b\r\n" % (line, data),
    }.get(how, b"%b\r\n%b\r\n" % (line, data))


HOWS = ("capitals", "extended", "line feeds", "turned ends", "torn off", "too long", "a sign", "a prefix", "a blank")
bodies = st.sampled_from(
    [
        EVENT,
        USAGE,
        EVENT * 2,
        b"data: x\n\n",
        b"data:x\n",
        b"data:",
        b"data:\n\n",
        b"data: a\ndata: b\n\n",
        b": ping\n\n",
        b"x",
    ]
) | st.binary(min_size=1, max_size=40)
good = st.builds(written, bodies, st.integers(1, 7), st.sampled_from(("", "", "capitals")))
pieces = st.one_of(
    good,
    good,
    good,
    st.builds(written, bodies | st.just(b""), st.integers(1, 9), st.sampled_from(("", *HOWS))),
    st.sampled_from(
        [b"0\r\n\r\n", b"0\r\nX-T: 1\r\n\r\n", b"1", b"\r\n", b"fffffff\r\n", b"ffffffffffffffff\r\nx\r\n"]
    ),
    st.binary(max_size=12),
)


@settings(max_examples=500)
@given(reads=st.lists(mutated(st.lists(pieces, min_size=1, max_size=4).map(b"".join)), min_size=1, max_size=4))
def test_reads_that_are_whole_chunks_are_passed_on_and_the_first_that_is_not_comes_back(reads: list[bytes]) -> None:
    with contextlib.ExitStack() as stack:
        intake = short.Intake()
        line = Line(stack, intake)
        passed: list[bytes] = []
        for read in filter(None, reads):
            line.engine.send(read)
            parted = intake.turn(NOW)
            if whole_chunks(read) is None:
                assert parted == [(line, read, b"")]
                assert len(intake) == 0
                break
            assert parted is None
            passed.append(read)
        assert line.read() == b"".join(passed)
        assert line.noted == noted_after(passed)


@given(data=st.lists(good, min_size=1, max_size=6).map(b"".join), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_nothing_is_lost_or_turned_round_however_a_stream_is_cut_into_reads(data: bytes, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    with contextlib.ExitStack() as stack:
        intake = short.Intake()
        line = Line(stack, intake)
        heard = b""
        for begin, end in itertools.pairwise(ends):
            line.engine.send(data[begin:end])
            for _, read, _ in intake.turn(NOW) or ():
                heard = line.read() + read + data[end:]
            if not len(intake):
                break
        else:
            heard = line.read()
        assert heard == data


@pytest.mark.parametrize(
    ("size", "flows"), [(64 * 1024 - 8 - 1, True), (64 * 1024 - 8, False)], ids=["fits", "fills the buffer"]
)
def test_a_read_that_fills_the_buffer_may_not_be_all_and_comes_back(
    stack: contextlib.ExitStack, size: int, flows: bool
) -> None:
    """What is still in the socket would be another edge for nobody."""
    intake = short.Intake()
    line = Line(stack, intake)
    data = framed(bytes(size))
    line.engine.send(data)
    assert intake.turn(NOW) == (None if flows else [(line, data, b"")])


def test_what_a_client_does_not_take_comes_back_and_nothing_is_read_for_it_any_more(
    stack: contextlib.ExitStack,
) -> None:
    intake = short.Intake()
    line, other = Line(stack, intake), Line(stack, intake)
    line.stick()
    line.engine.send(framed(EVENT))
    other.engine.send(framed(EVENT))
    assert intake.turn(NOW) == [(line, b"", framed(EVENT))]
    assert line.noted == noted_after([framed(EVENT)])  # it is as good as sent
    assert other.read() == framed(EVENT)
    line.engine.send(framed(b"later"))
    assert intake.turn(NOW) is None
    assert line.socket.recv(100) == framed(b"later")


def test_what_a_client_takes_in_part_comes_back_without_that_part(stack: contextlib.ExitStack) -> None:
    intake = short.Intake()
    line = Line(stack, intake)
    line.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    sent = framed(bytes(range(256)) * 200)
    line.engine.send(sent)
    ((owner, read, unsent),) = intake.turn(NOW)
    assert (owner, read) == (line, b"")
    assert 0 < len(unsent) < len(sent)
    assert line.read() + unsent == sent


@pytest.mark.parametrize("last", [b"", framed(EVENT), b"0\r\n\r\n"], ids=["alone", "with a chunk", "with the last one"])
@pytest.mark.parametrize("half", [True, False], ids=["of its half", "of the connection"])
def test_an_engines_end_is_its_transports_to_read_and_what_it_said_before(
    stack: contextlib.ExitStack, last: bytes, half: bool
) -> None:
    intake = short.Intake()
    line = Line(stack, intake)
    line.engine.send(last)
    if half:
        line.engine.shutdown(socket.SHUT_WR)
    else:
        line.engine.close()
    assert intake.turn(NOW) == [(line, b"", b"")]
    assert line.read() == b""
    assert line.socket.recv(1000) == last


def test_an_engines_reset_is_told(stack: contextlib.ExitStack) -> None:
    intake = short.Intake()
    line = Ends(stack)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = stack.enter_context(socket.create_connection(listener.getsockname()))
        engine, _ = listener.accept()
    intake.join(line.conduit, ours.fileno(), line)
    engine.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    engine.close()
    assert intake.turn(NOW) == [(line, b"", b"")]


def test_a_client_that_reset_its_connection_is_its_transports_to_find_out(stack: contextlib.ExitStack) -> None:
    intake = short.Intake()
    line = Line(stack, intake)
    line.theirs.close()
    line.engine.send(framed(EVENT))
    assert intake.turn(NOW) == [(line, b"", framed(EVENT))]


def test_after_close_nothing_is_written_to_whoever_has_the_descriptor_next(stack: contextlib.ExitStack) -> None:
    intake = short.Intake()
    line = Line(stack, intake)
    line.conduit.close()
    line.conduit.close()
    line.engine.send(framed(EVENT))
    assert intake.turn(NOW) is None
    assert line.read() == b""
    assert line.noted == noted_after([framed(EVENT)])


def test_hundreds_at_once_have_their_turn_and_whoever_is_left_out_has_the_next(stack: contextlib.ExitStack) -> None:
    intake = short.Intake()
    conduits = [short.Conduit(-1) for _ in range(300)]  # without clients, for the sake of low limits of descriptors
    for joining in conduits:
        engine, ours = (stack.enter_context(end) for end in socket.socketpair())
        assert intake.join(joining, ours.fileno(), None)
        engine.send(framed(EVENT))
    turns = 0
    readable = select.poll()  # not `select`, which knows descriptors up to 1,023 alone
    readable.register(intake.fileno(), select.POLLIN)
    while readable.poll(0):
        assert intake.turn(NOW) is None
        turns += 1
    assert turns == 2
    assert {joined.events for joined in conduits} == {1}


def test_who_leaves_is_read_no_more_and_may_join_again(stack: contextlib.ExitStack) -> None:
    intake = short.Intake()
    line = Line(stack, intake)
    for _ in range(2):
        intake.leave(line.conduit)
        assert len(intake) == 0
    line.engine.send(framed(EVENT))
    assert intake.turn(NOW) is None
    assert intake.join(line.conduit, line.socket.fileno(), "another owner")
    assert intake.turn(NOW) is None  # what had come before is seen, too
    assert line.read() == framed(EVENT)
    line.engine.close()
    assert intake.turn(NOW) == [("another owner", b"", b"")]


def test_what_cannot_join_is_as_it_was(stack: contextlib.ExitStack) -> None:
    intake = short.Intake()
    line = Line(stack, intake)
    with pytest.raises(ValueError, match="joined already"):
        intake.join(line.conduit, line.socket.fileno(), line)
    other = Ends(stack)
    assert not intake.join(other.conduit, line.socket.fileno(), other)  # the kernel knows this socket
    assert not intake.join(other.conduit, -1, other)
    assert len(intake) == 1
    with pytest.raises(TypeError):
        intake.leave(line)
    with pytest.raises(TypeError):
        intake.join(line, 0, line)


def test_owners_and_conduits_live_as_long_as_they_are_joined_and_no_longer(stack: contextlib.ExitStack) -> None:
    class Owner: ...

    intake = short.Intake()
    line = Line(stack, intake)
    intake.leave(line.conduit)
    owner = Owner()
    told = weakref.ref(owner)
    assert intake.join(line.conduit, line.socket.fileno(), owner)
    del owner
    line.conduit = short.Conduit(-1)
    gc.collect()
    line.engine.send(framed(EVENT))
    assert intake.turn(NOW) is None
    assert line.read() == framed(EVENT)
    assert told() is not None
    line.engine.close()
    assert intake.turn(NOW) == [(told(), b"", b"")]
    assert told() is None
