"""Log records written in batches: one system call for all lines of a tenth of a second, not one for each.

At 20,000 requests a second and core the log line of each was a quarter of all that a frontend did: formatting the
time, looking whether the file has been renamed, writing, flushing. Here a record waits in a list, and all that is
paid for each is its own text (`broker/lines.py`); the beginning of the line, which the formatter makes, is shared by
the lines of a second, but for its milliseconds (benchmarks/test_lean.py).

Lost by a kill -9: what the last tenth of a second brought. Lost by an orderly end, or before an error: nothing.
"""

from __future__ import annotations

import asyncio
import logging
import logging.handlers
from typing import TextIO

from broker.lines import MAX_RECORDS, Pending, joined

PERIOD_S = 0.1
_WHOLE_SECOND = ",000"
"""How `logging` writes that there are no milliseconds."""


class Batched(logging.Handler):
    """Stands before a handler that writes to a stream; owned by the process. Passes on at once until `start`."""

    def __init__(self, target: logging.StreamHandler[TextIO]) -> None:
        super().__init__(target.level)
        self.pending = Pending(self._due)
        self._target = target
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._shares = type(target.formatter) is logging.Formatter
        """Whether a line is a beginning and a message, and nothing else. (fd-router's are not.)"""
        self._formatted = (0, "")
        """The second and the logger that `_around` is of: what stands before and behind the milliseconds."""
        self._around: list[str] = []

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Batches from now on, on the loop that is running."""
        self._loop = loop
        self.pending.takes_lines = self._shares

    def stop(self) -> None:
        """Writes what there is, and passes on at once again. Idempotent."""
        self.flush()
        self._loop = None
        self.pending.takes_lines = False

    def handle(self, record: logging.LogRecord) -> bool:
        """Takes no lock: everything that logs in a frontend does so on its loop's thread."""
        if self._loop is None or record.levelno >= logging.ERROR or record.exc_info or record.stack_info:
            self.flush()
            return self._target.handle(record)
        if self._target.filter(record):
            self.pending.add(record)
        return True

    def _due(self) -> None:
        if self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(PERIOD_S, self.flush)
            self.pending.is_timed = True
        elif len(self.pending.records) >= MAX_RECORDS:
            self.flush()

    def flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pending = self.pending
        pending.is_timed = False
        records, pending.records = pending.records, []
        if records:
            self._write(joined(records, self._target.format, self._beginning))

    def close(self) -> None:
        self.stop()
        self._target.close()
        super().close()

    def _beginning(self, created: float, name: str) -> str:
        """Formatted once a second, where that is seen to differ in its milliseconds alone."""
        second, thousandth = divmod(int(created * 1000), 1000)
        if self._formatted != (second, name):
            self._formatted = second, name
            self._around = self._target.format(_empty(second, name, logging.INFO)).split(_WHOLE_SECOND)
        if len(self._around) != 2:
            return self._target.format(_empty(created, name, logging.INFO))
        return f"{self._around[0]},{thousandth:03d}{self._around[1]}"

    def _write(self, text: str) -> None:
        target = self._target
        target.acquire()
        try:
            if isinstance(target, logging.handlers.WatchedFileHandler):
                target.reopenIfNeeded()
            target.stream.write(text)
            target.flush()
        except OSError:  # a full disk ends no request; `logging` says so in its own way
            target.handleError(_empty(0.0, __name__, logging.ERROR))
        finally:
            target.release()


def _empty(created: float, name: str, level: int) -> logging.LogRecord:
    record = logging.LogRecord(name, level, "", 0, "", None, None)
    record.created = created
    record.msecs = float(int(created * 1000) % 1000)
    return record


def start(loop: asyncio.AbstractEventLoop) -> None:
    """Puts a `Batched` before each of the process's handlers, and lets `logging` collect what no line shows."""
    root = logging.getLogger()
    if all(type(handler.formatter) is logging.Formatter for handler in root.handlers):
        # As logging's documentation advises: caller, thread and process are in no line of ours, only in fd-router's.
        logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler):
            batched = Batched(handler)
            batched.start(loop)
            root.removeHandler(handler)
            root.addHandler(batched)


def stop() -> None:
    """Writes what there is; to be called when the loop ends."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Batched):
            handler.stop()
