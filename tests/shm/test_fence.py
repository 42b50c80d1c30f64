"""What can be said of the fence without a second CPU; tests/stress shows that it orders."""

from __future__ import annotations

import os
import signal

import pytest

from shm import fence


def test_a_fence_may_interrupt_a_fence() -> None:
    """From a signal handler in mid-fence the lock is taken: it must neither wait nor do nothing."""
    assert fence._acquire(False)
    try:
        previous = signal.signal(signal.SIGUSR1, lambda *_: fence.by_lock())
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            signal.signal(signal.SIGUSR1, previous)
        fence.by_lock()
    finally:
        fence._release()
    fence.by_lock()
    assert not fence._lock.locked()


@pytest.mark.parametrize(
    ("machine", "implementation", "promised"),
    [
        ("x86_64", "cpython", True),
        ("AMD64", "cpython", True),
        ("aarch64", "cpython", False),
        ("riscv64", "cpython", False),
        ("x86_64", "pypy", False),
        ("", "cpython", False),
    ],
)
def test_order_is_promised_where_it_was_argued_only(machine: str, implementation: str, promised: bool) -> None:
    assert fence.promised(machine, implementation) is promised


def test_refusing_names_the_cpu_and_the_way_out() -> None:
    assert "run one frontend" in fence.refusal()
    assert "this CPU (" in fence.refusal()
