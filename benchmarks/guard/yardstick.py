"""Two measures of work that hold on any machine: bytecodes executed and CPU time, both in units of a fixed loop.

Bytecodes repeat to the last one, but do not see what C code does. CPU time sees everything and wavers. Divided by what
the fixed loop takes in the same process, the speed of the machine falls out of the one, and most of the difference
between versions of Python out of the other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

Work = Callable[[], object]


class Reference:
    """The fixed loop: attribute and dict look-ups, calls, small ints, a little numpy, as in the real thing.

    Changing it voids every bound that was chosen with it.
    """

    def __init__(self) -> None:
        self._cells = {f"cell{i}": i for i in range(64)}
        self._matrix = np.arange(8 * 64, dtype=np.int64).reshape(8, 64)
        self._sum = 0

    def __call__(self) -> int:
        for name in ("cell3", "cell17", "cell42", "cell63") * 8:
            self._sum = self._step(name, self._sum)
        return int(np.add.reduce(self._matrix, axis=0).argmin()) + self._sum

    def _step(self, name: str, total: int) -> int:
        value = self._cells[name]
        if value & 1:
            return (total + value) & 0xFFFF
        return (total ^ value) & 0xFFFF


def bytecode_ratio(work: Work, reference: Work, *, times: int = 20) -> float:
    """Bytecodes of one call of `work` in those of one call of `reference`."""
    return _bytecodes(work, times) / _bytecodes(reference, times)


def cpu_ratio(work: Work, reference: Work, *, times: int, blocks: int = 15) -> float:
    """CPU time of one call of `work` in calls of `reference`.

    Both are timed in turn, block by block, and the cheapest block of each counts: what disturbs a block (another
    process's cache lines, a lower clock) only ever adds.
    """
    cheapest = [float("inf"), float("inf")]
    for _ in range(blocks):
        for which, run in enumerate((work, reference)):
            start = time.thread_time_ns()
            for _ in range(times):
                run()
            cheapest[which] = min(cheapest[which], (time.thread_time_ns() - start) / times)
    return cheapest[0] / cheapest[1]


def _bytecodes(work: Work, times: int) -> float:
    """Python bytecodes per call, in every Python function that it reaches."""
    executed = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal executed
        frame.f_trace_lines = False
        frame.f_trace_opcodes = True
        executed += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for _ in range(times):
            work()
    finally:
        sys.settrace(before)
    return executed / times
