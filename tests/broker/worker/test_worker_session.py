"""When an engine says what to its scheduler."""

from __future__ import annotations

import pytest

from broker import wire
from broker.types import Role
from broker.worker.session import HELLO_AGAIN_S, REFUSED_AGAIN_S, REJOIN_AFTER_S, Phase, Session

INCARNATION = bytes(range(16, 32))
HELLO = wire.EngineHello(1, INCARNATION, "ipc://@e", Role.MIXED, ["m"], 4)
BEAT = wire.EngineBeat(INCARNATION, 4, True)


@pytest.fixture
def joined() -> Session:
    """Joined at time 0 in epoch 7."""
    session = Session(HELLO)
    session.connected(0.0)
    session.due(0.0)
    session.hear(wire.Accepted(1, 7), 0.0)
    return session


def test_nothing_is_said_before_there_is_a_connection() -> None:
    assert Session(HELLO).due(100.0) is None


def test_hello_is_repeated_until_it_is_answered() -> None:
    session = Session(HELLO)
    session.connected(10.0)
    assert session.due(10.0) == HELLO
    assert session.due(10.5) is None
    assert session.due(10.0 + HELLO_AGAIN_S) == HELLO


def test_beats_come_every_half_second_once_accepted(joined: Session) -> None:
    said = [t / 10 for t in range(21) if joined.due(t / 10) == BEAT]
    assert said == [0.5, 1.0, 1.5, 2.0]


def test_a_beat_tells_readiness_and_credit_of_now(joined: Session) -> None:
    joined.ready, joined.capacity = False, 2
    assert joined.due(0.5) == wire.EngineBeat(INCARNATION, 2, False)


@pytest.mark.parametrize("heard", [wire.SchedulerBeat(8), wire.HelloAgain()], ids=["new epoch", "hello again"])
def test_hello_is_said_again_at_once(joined: Session, heard: wire.SchedulerToEngine) -> None:
    joined.hear(heard, 0.3)
    assert joined.due(0.3) == HELLO


def test_the_same_epoch_changes_nothing(joined: Session) -> None:
    joined.hear(wire.SchedulerBeat(7), 0.3)
    assert joined.phase is Phase.JOINED


@pytest.mark.parametrize(("epoch", "said"), [(8, HELLO), (7, None), (0, None)])
def test_only_a_greater_epoch_of_a_frontend_counts(joined: Session, epoch: int, said: object) -> None:
    joined.notice_epoch(epoch, 0.3)
    assert joined.due(0.3) == said


def test_a_refused_hello_is_said_again_later() -> None:
    session = Session(HELLO)
    session.connected(0.0)
    session.due(0.0)
    session.hear(wire.Refused("the table is full"), 0.1)
    assert session.refusal == "the table is full"
    assert session.due(0.1 + REFUSED_AGAIN_S / 2) is None
    assert session.due(0.1 + REFUSED_AGAIN_S) == HELLO


def test_silence_is_noticed_and_ends_with_a_new_connection(joined: Session) -> None:
    assert not joined.is_silent(REJOIN_AFTER_S)
    later = REJOIN_AFTER_S + 0.1
    assert joined.is_silent(later)
    assert joined.phase is Phase.JOINED, "silence alone is no reason to stop beating"
    joined.connected(later)
    assert not joined.is_silent(later)
    assert joined.due(later) == HELLO


def test_nothing_is_said_after_goodbye(joined: Session) -> None:
    assert joined.leave() == wire.EngineGoodbye(INCARNATION)
    joined.hear(wire.HelloAgain(), 1.0)
    joined.connected(1.0)
    assert joined.due(100.0) is None
    assert not joined.is_silent(100.0)
