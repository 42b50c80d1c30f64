"""The conversation of an engine with the scheduler, as a pure state machine.

          connected                Accepted                       leave
    AWAY ----------> JOINING -------------------> JOINED ----------------> LEFT
      ^                 |  ^                        |
      |   silence       |  +------------------------+
      +-----------------+    HelloAgain, another epoch, Refused

JOINING repeats `EngineHello`, JOINED sends a beat every `BEAT_S`; the shell asks `due(now)` a few times per beat and
sends what it gets. A hello is idempotent, so saying it once too often costs nothing.
"""

from __future__ import annotations

from enum import Enum, auto

from broker import wire

HELLO_AGAIN_S = 1.0
"""An unanswered hello is repeated after this long."""
REFUSED_AGAIN_S = 5.0
"""So is a refused one: a full table may have room by then."""
REJOIN_AFTER_S = 2 * wire.DEAD_AFTER_S
"""A scheduler silent for this long may be gone for good, and its run with it: its endpoints are asked for anew."""


class Phase(Enum):
    AWAY = auto()
    JOINING = auto()
    JOINED = auto()
    LEFT = auto()


class Session:
    """Owner: the engine. Times are of one monotonic clock, in seconds."""

    def __init__(self, hello: wire.EngineHello) -> None:
        self.phase = Phase.AWAY
        self.epoch = -1
        """The epoch that accepted us last; -1 = none yet."""
        self.refusal = ""
        """Why the last hello was refused; empty = it was not."""
        self.ready = True
        self.capacity = hello.capacity
        self._hello = hello
        self._next = 0.0
        self._heard = 0.0

    def connected(self, now: float) -> None:
        """The control socket leads to a (perhaps new) scheduler."""
        if self.phase is not Phase.LEFT:
            self.phase, self._next, self._heard = Phase.JOINING, now, now

    def due(self, now: float) -> wire.EngineHello | wire.EngineBeat | None:
        """What must be said now, if anything."""
        if now < self._next:
            return None
        if self.phase is Phase.JOINING:
            self._next = now + HELLO_AGAIN_S
            return self._hello
        if self.phase is Phase.JOINED:
            self._next = now + wire.BEAT_S
            return wire.EngineBeat(self._hello.incarnation, self.capacity, self.ready)
        return None

    def hear(self, message: wire.SchedulerToEngine, now: float) -> None:
        self._heard = now
        if self.phase is Phase.LEFT:
            return
        match message:
            case wire.Accepted(epoch=epoch):
                self.phase, self.epoch, self.refusal, self._next = Phase.JOINED, epoch, "", now + wire.BEAT_S
            case wire.Refused(reason=reason):
                self.phase, self.refusal, self._next = Phase.JOINING, reason, now + REFUSED_AGAIN_S
            case wire.SchedulerBeat(epoch=epoch):
                if self.phase is Phase.JOINED and epoch != self.epoch:
                    self._join_again(now)
            case wire.HelloAgain():
                if self.phase is Phase.JOINED:
                    self._join_again(now)

    def notice_epoch(self, epoch: int, now: float) -> None:
        """A frontend speaks of this epoch; a newer one than ours means that the scheduler was replaced."""
        if self.phase is Phase.JOINED and epoch > self.epoch:
            self._join_again(now)

    def is_silent(self, now: float) -> bool:
        """The scheduler has said nothing for so long that its run may be over."""
        return self.phase in (Phase.JOINING, Phase.JOINED) and now - self._heard > REJOIN_AFTER_S

    def leave(self) -> wire.EngineGoodbye:
        self.phase = Phase.LEFT
        return wire.EngineGoodbye(self._hello.incarnation)

    def _join_again(self, now: float) -> None:
        self.phase, self._next = Phase.JOINING, now
