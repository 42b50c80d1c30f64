"""Tells events in the words of a face, to the log."""

from __future__ import annotations

import logging
import re
from functools import lru_cache

from broker.faces import Event, Face

_UNPRINTABLE = re.compile(r"[^!-~]")


class Narrator:
    """One part's voice. An event that the face has no line for, or the level hides, costs a look-up."""

    __slots__ = ("_lines", "_logger")

    def __init__(self, face: Face, logger: str) -> None:
        self._lines = face.lines
        self._logger = logging.getLogger(logger)

    def tells(self, event: Event) -> bool:
        """Whether anything would be written: to be asked where a fact has its price."""
        line = self._lines.get(event)
        return line is not None and self._logger.isEnabledFor(line.level)

    def tell(self, event: Event, **facts: object) -> None:
        line = self._lines.get(event)
        if line is not None and self._logger.isEnabledFor(line.level):
            self._logger.log(line.level, line.text, facts, stacklevel=2)


def printable(text: str) -> str:
    """Text from outside in a form that cannot forge a log line."""
    return _printable(text[:128])


@lru_cache(1024)
def _printable(text: str) -> str:
    """Kept: paths and models come again with every request."""
    return _UNPRINTABLE.sub("?", text)
