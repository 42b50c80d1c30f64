"""Lines of the log that are said for every request, past `logging`: no record is made of them, which alone takes as
long as everything else about a line.

    Lines.write --> Pending (of each Batched handler) --> once in a tenth of a second, as text, to the handler's stream

Here is what is done for each line, and is compiled; the handler itself is in `broker/batched.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

MAX_RECORDS: Final = 4096
"""Written at once when there are so many."""
_INFO: Final = logging.INFO


class Line:
    """What is left of a record where a line is a beginning and a text, and nothing else."""

    def __init__(self, created: float, name: str, text: str) -> None:
        """`created`: seconds since the epoch; `name`: the logger's. Its level is INFO."""
        self.created = created
        self.name = name
        self.text = text


class Pending:
    """What a handler has still to write. Owned by it."""

    def __init__(self, due: Callable[[], None]) -> None:
        """`due` is called when there is something and no time is set for it, or when there is too much."""
        self.records: list[logging.LogRecord | Line] = []
        self.takes_lines = False
        self.is_timed = False
        self._due = due

    def add(self, record: logging.LogRecord | Line) -> None:
        self.records.append(record)
        if not self.is_timed or len(self.records) >= MAX_RECORDS:
            self._due()


class Lines:
    """What a logger says for every request, at INFO."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._logger = logging.getLogger(name)
        self._levels: dict[int, bool] = self._logger._cache  # type: ignore[attr-defined]  # the rest of it is a call
        """What `isEnabledFor` looks at first: emptied, in place, whenever a level changes."""
        self._root = logging.root
        self._clock = time.time
        self._handlers: list[logging.Handler] = []
        self._pending: list[Pending] | None = []
        """Of those handlers, that want lines of this level; None: one of them keeps none."""

    @property
    def is_on(self) -> bool:
        known = self._levels.get(_INFO)
        return self._logger.isEnabledFor(_INFO) if known is None else known

    def write(self, text: str) -> None:
        """To be called if `is_on`."""
        if self._root.handlers != self._handlers:
            self._look()
        if self._pending is not None:
            for pending in self._pending:
                if not pending.takes_lines:
                    break
            else:
                line = Line(self._clock(), self._name, text)
                for pending in self._pending:
                    pending.add(line)
                return
        self._logger.info("%s", text)

    def _look(self) -> None:
        """At the process's handlers, which are seldom others than before."""
        self._handlers = list(self._root.handlers)
        self._pending = found = []
        for handler in self._handlers:
            pending = getattr(handler, "pending", None)
            if not isinstance(pending, Pending):
                self._pending = None
                break
            if handler.level <= _INFO:
                found.append(pending)


def joined(
    records: Iterable[logging.LogRecord | Line],
    whole: Callable[[logging.LogRecord], str],
    beginning: Callable[[float, str], str],
) -> str:
    """Their text. `whole`: of a record; `beginning`: of a line at a time (seconds) and of a logger, up to its text."""
    parts: list[str] = []
    start, name, millisecond = "", "", -1
    for record in records:
        if isinstance(record, Line):
            its = int(record.created * 1000)
            if its != millisecond or record.name != name:
                millisecond, name = its, record.name
                start = beginning(record.created, name)
            parts.append(start)
            parts.append(record.text)
        else:
            parts.append(whole(record))
        parts.append("\n")
    return "".join(parts)
