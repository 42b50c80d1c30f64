"""Requests under way at an engine: whose they are, and who runs them."""

from __future__ import annotations

from typing import Protocol

from broker.worker.link import Load
from broker.worker.outbox import Outbox
from broker.worker.request import Request


class Call:
    """One request under way, and how to answer it: the handle for `emit`, `finish` and `fail`."""

    __slots__ = ("ended", "frontend", "number", "request", "sequence")

    def __init__(self, frontend: Frontend, number: int, request: Request) -> None:
        self.frontend = frontend
        self.number = number
        """The frontend's number for it."""
        self.request = request
        self.sequence = 0
        """Deltas emitted so far."""
        self.ended = False
        """Answered or aborted: `emit`, `finish` and `fail` do nothing any more."""

    def __repr__(self) -> str:
        return f"<Call {self.request.id} {self.sequence} deltas{' ended' if self.ended else ''}>"


class Runner(Protocol):
    """What runs the requests of an engine."""

    def open(self, call: Call) -> None:
        """A request for us. Raise `EngineError` to refuse it."""

    def abort(self, call: Call) -> None:
        """Nobody wants the answer any more; `call.ended` is already true. Called at most once, never after the end."""

    def load(self) -> Load:
        """The counts now."""


class Frontend:
    """What the engine knows of one frontend."""

    def __init__(self, identity: bytes, incarnation: bytes, now: float) -> None:
        self.identity = identity
        self.heard = now
        self.welcome = False
        """It said hello in our version of the protocol."""
        self.complained = False
        """A bad frame of its was logged already."""
        self.calls: dict[int, Call] = {}
        self.outbox = Outbox(incarnation)
        self.stalled = False
        """The socket refused a message; a timer tries again."""
