import signal
import sys
from collections.abc import Sequence

from broker.child import Backoff, Child
from tests.support.waiting import until


def test_a_child_that_dies_at_once_waits_longer_each_time_up_to_a_limit() -> None:
    backoff = Backoff()
    delays = [backoff.after(lived=0.1) for _ in range(9)]
    assert delays[0] == 0.0
    assert delays[1:4] == [Backoff.FIRST_S, 2 * Backoff.FIRST_S, 4 * Backoff.FIRST_S]
    assert delays == sorted(delays)
    assert delays[-1] == Backoff.LONGEST_S


def test_a_healthy_life_is_forgiven() -> None:
    backoff = Backoff()
    for _ in range(9):
        backoff.after(lived=0.1)
    assert backoff.after(lived=Backoff.HEALTHY_S) == 0.0


def child_running(program: str) -> Child:
    def command(_life: int, ready_fd: int) -> Sequence[str]:
        return ["-c", program, str(ready_fd)]

    return Child("child", command)


def test_a_child_is_ready_when_it_has_said_so() -> None:
    child = child_running("import os, sys; os.write(int(sys.argv[1]), b'ready\\n'); import time; time.sleep(60)")
    child.start(1, [], now=0.0)
    child.read_ready()
    assert child.ready
    assert child.pid > 0
    child.signal(signal.SIGKILL)
    assert until(lambda: child.died(now=1.0), "its end") == -signal.SIGKILL


def test_a_child_that_dies_without_a_word_is_not_ready_and_is_due_again() -> None:
    child = child_running("import sys; sys.exit(3)")
    child.start(1, [], now=10.0)
    child.read_ready()
    assert not child.ready
    assert until(lambda: child.died(now=10.5), "its end") == 3
    assert child.start_at == 10.5
    assert child.pid == 0
    assert child.died(now=11.0) is None


def test_the_interpreter_is_the_supervisors_own() -> None:
    child = child_running(f"import sys; sys.exit(sys.executable != {sys.executable!r})")
    child.start(1, [], now=0.0)
    assert child.process is not None
    assert child.process.wait(60) == 0
