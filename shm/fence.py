"""One function that orders this process's stores before its later loads, and what that rests on.

Theory. Two processes that share memory agree on values, not on time. Three orders matter here:

* load before load, store before store: a seqlock and "counter first, flag second" need them.
  x86-64 keeps both for ordinary memory (TSO: Intel SDM vol. 3, 9.2.2), and CPython cannot merge or swap them,
  because each access to a shared cell is a call of its own through `memoryview` or numpy.
  ARM keeps neither without a barrier, and Python offers none per access.
* store before load of *another* cell: taking a lease needs it (store "I am coming", then load "is it still
  open?"). No CPU keeps this by itself: the store waits in the store buffer while the load already reads.

Every x86-64 instruction with a `lock` prefix drains the store buffer before any later load (SDM 9.2.3.9), so it is
a full fence. Python has no fence, but it has locks: acquiring a free `threading.Lock` is one locked
compare-and-exchange on a word of this process alone (CPython <= 3.12: `sem_trywait`; >= 3.13: `PyMutex`), and
never a system call. That is the whole trick: nobody ever contends for this lock, only its instruction counts.

Where the compiled twins are (`_cells.c`), the fence is one, and nothing but that instruction.

The lock must be *free* for that: trying a taken one only loads its word. It is taken when another thread, or
the frame that a signal handler interrupted, is between the two calls below; then a lock of our own is made,
which is free for certain.
"""

from __future__ import annotations

import platform
import sys
from _thread import allocate_lock
from collections.abc import Callable
from typing import Final

from shm.cells import compiled

_lock: Final = allocate_lock()
_acquire: Final = _lock.acquire
_release: Final = _lock.release

REFUSAL = (
    "this CPU ({machine}) may reorder loads and stores in ways that Python cannot forbid: "
    "more than one frontend is possible on x86-64 with CPython only; run one frontend"
)


def by_lock() -> None:
    """`full` without its twin."""
    if _acquire(False):
        _release()
    else:
        allocate_lock().acquire()


full: Callable[[], None] = by_lock if compiled is None else compiled.full
"""Makes every store before the call visible to all processes before any load after it (where `promised`)."""


def promised(machine: str | None = None, implementation: str | None = None) -> bool:
    """Whether this CPU and this Python keep the three orders above, so that several processes may share memory."""
    machine = platform.machine() if machine is None else machine
    implementation = sys.implementation.name if implementation is None else implementation
    return machine.lower() in {"x86_64", "amd64"} and implementation == "cpython"


def refusal() -> str:
    """The sentence for refusing more than one frontend where nothing is promised."""
    return REFUSAL.format(machine=platform.machine() or "unknown")
