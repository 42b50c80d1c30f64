"""When to look at a file descriptor that many speak to: at once after a silence, every so often while they go on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Lookout:
    """Calls `look` when `fd` is readable, or when a rest is over. Whoever looked says what came of it: `rest`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, look: Callable[[], None], rest_s: float) -> None:
        """`rest_s`: once something was heard, `fd` is not looked at again for about so long at most; 0: no rests. All
        that rest as long wake up together: what costs is that a process is woken, not what it then does."""
        self._loop = loop
        self._fd = fd
        self._look = look
        self._rest_s = rest_s
        self._resting: asyncio.TimerHandle | None = None
        self._closed = False
        loop.add_reader(fd, look)

    def rest(self, heard: bool) -> None:
        """After a look that left nothing: sleeps as long as there is something to hear each time, else is woken."""
        if self._closed or not self._rest_s:
            return
        was_resting = self._resting is not None
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if heard:
            if not was_resting:
                self._loop.remove_reader(self._fd)
            # The tenth: timers may come a millisecond early, and would be set for the same moment once more.
            rests = math.floor(self._loop.time() / self._rest_s + 0.1) + 1
            self._resting = self._loop.call_at(rests * self._rest_s, self._look)
        elif was_resting:
            self._loop.add_reader(self._fd, self._look)

    def close(self) -> None:
        """Idempotent. Before the file descriptor is closed."""
        if not self._closed:
            self._closed = True
            if self._resting is not None:
                self._resting.cancel()
            self._loop.remove_reader(self._fd)
