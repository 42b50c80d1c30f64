"""A socket that rests between what it hears: nothing is lost, nothing is read in between, a silence ends the rest."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import zmq

from broker.port import Frames, Port

REST_S = 0.02


class Timer:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Loop:
    """A loop as a port uses one; the test says what happens when."""

    def __init__(self) -> None:
        self.now = 100.005
        self.reader: Callable[[], None] | None = None
        self.timer: Timer | None = None
        self._soon: list[Callable[[], None]] = []
        self.call_soon = self._soon.append

    def time(self) -> float:
        return self.now

    def add_reader(self, fd: int, call: Callable[[], None]) -> None:
        self.reader = call

    def remove_reader(self, fd: int) -> None:
        self.reader = None

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        self.timer = Timer(when, call)
        return self.timer

    def turn(self) -> None:
        """What is due soon, and what the file descriptor would tell."""
        while self._soon:
            self._soon.pop(0)()
        if self.reader is not None:
            self.reader()

    def sleep(self) -> None:
        """Until the timer."""
        assert self.timer is not None
        assert self.timer.call is not None
        self.now = self.timer.when
        self.timer.call()


class Site:
    """A port that has just been made, and who talks to it."""

    def __init__(self, context: zmq.Context[Any], rest_s: float) -> None:
        self.loop = Loop()
        self.heard: list[Frames] = []
        socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        socket.bind("inproc://port")
        self.other: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self.other.connect("inproc://port")
        loop = cast("asyncio.AbstractEventLoop", self.loop)
        self.port = Port(loop, socket, self.heard.append, rest_s=rest_s)
        self.loop.turn()

    def say(self, *words: bytes) -> None:
        for word in words:
            self.other.send_multipart([word, b"", b"load"])

    def words(self) -> list[bytes]:
        """Heard since the last look."""
        words = [frames[0] for frames in self.heard]
        assert all(frames[1:] == [b"", b"load"] for frames in self.heard)
        self.heard.clear()
        return words

    def close(self) -> None:
        self.port.close()
        self.other.close(0)


@pytest.fixture
def site() -> Iterator[Callable[[float], Site]]:
    with contextlib.ExitStack() as stack:
        context: zmq.Context[Any] = zmq.Context()
        stack.callback(context.term)

        def make(rest_s: float) -> Site:
            it = Site(context, rest_s)
            stack.callback(it.close)
            return it

        yield make


def test_what_is_said_after_a_silence_is_heard_at_once_and_what_follows_together(site: Callable[[float], Site]) -> None:
    it = site(REST_S)
    it.say(b"1", b"2")
    it.loop.turn()
    assert it.words() == [b"1", b"2"]
    it.say(b"3")
    it.loop.turn()
    it.say(b"4")
    it.loop.turn()
    assert it.words() == []
    it.loop.sleep()
    assert it.words() == [b"3", b"4"]


def test_rests_end_at_the_same_moments_for_all(site: Callable[[float], Site]) -> None:
    it = site(REST_S)
    for _ in range(3):
        it.say(b"x")
        it.loop.turn()
        it.loop.sleep()
        assert it.loop.now == pytest.approx(REST_S * round(it.loop.now / REST_S))
    assert len(it.words()) == 3


def test_a_timer_that_comes_too_early_is_not_set_for_the_same_moment_again(site: Callable[[float], Site]) -> None:
    it = site(REST_S)
    it.say(b"1")
    it.loop.turn()
    it.say(b"2")
    timer = it.loop.timer
    assert timer is not None
    assert timer.call is not None
    it.loop.now = timer.when - 0.001
    timer.call()
    assert it.loop.timer is not None
    assert it.loop.timer.when == pytest.approx(timer.when + REST_S)
    assert it.words() == [b"1", b"2"]


def test_a_rest_in_which_nothing_was_said_is_the_last(site: Callable[[float], Site]) -> None:
    it = site(REST_S)
    it.say(b"1")
    it.loop.turn()
    it.loop.sleep()
    it.say(b"2")
    it.loop.turn()
    assert it.words() == [b"1", b"2"]


def test_without_a_rest_everything_is_heard_at_once(site: Callable[[float], Site]) -> None:
    it = site(0.0)
    for word in (b"1", b"2", b"3"):
        it.say(word)
        it.loop.turn()
        assert it.words() == [word]
    assert it.loop.timer is None


def test_a_receiver_that_raises_leaves_nothing_lying(site: Callable[[float], Site]) -> None:
    it = site(REST_S)
    heard: list[Frames] = []

    def receive(frames: Frames) -> None:
        heard.append(frames)
        raise ValueError(frames[0])

    it.port._receive = receive
    it.say(b"1", b"2")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"b'[12]'"):
            it.loop.turn()
    assert [frames[0] for frames in heard] == [b"1", b"2"]


def test_a_port_that_is_closed_while_it_rests_wakes_no_more(site: Callable[[float], Site]) -> None:
    it = site(REST_S)
    it.say(b"1")
    it.loop.turn()
    it.port.close()
    assert it.loop.timer is not None
    assert (it.loop.timer.call, it.loop.reader) == (None, None)
