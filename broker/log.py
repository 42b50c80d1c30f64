"""Logging of all processes: one line format, standard output or one file, and its rotation.

Every process appends to the face's file (`logs/penstock.log`) itself (O_APPEND keeps lines whole). The supervisor alone
renames it at midnight; the others notice by its inode (`WatchedFileHandler`) and open the new one.
"""

from __future__ import annotations

import datetime
import logging
import logging.handlers
import sys
from pathlib import Path

from broker.config import Log
from broker.faces import PENSTOCK, Face

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


def setup(log: Log, process: str, face: Face = PENSTOCK) -> None:
    """Sends this process's log where the settings say. `process` names it in every line, e.g. `frontend-0`."""
    handlers: list[logging.Handler]
    if log.output == "file":
        face.log_file.parent.mkdir(exist_ok=True)
        handlers = [logging.handlers.WatchedFileHandler(face.log_file, encoding="utf-8")]
    else:
        errors = logging.StreamHandler(sys.stderr)
        errors.setLevel(logging.ERROR)
        rest = logging.StreamHandler(sys.stdout)
        rest.addFilter(lambda record: record.levelno < logging.ERROR)
        handlers = [errors, rest]
    for handler in handlers:
        handler.setFormatter(face.formatter(process))
    logging.basicConfig(level=LEVELS[log.level], handlers=handlers, force=True)
    logging.captureWarnings(True)
    # One line a request is ours to write; these would add their own for every poll of every engine.
    for name in ("uvicorn.access", "aiohttp.access"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Rotation:
    """Renames the log at midnight and removes archives by age, then by total size. Owned by the supervisor."""

    def __init__(self, log: Log, now: datetime.datetime, file: Path) -> None:
        self._log = log
        self._file = file
        self._day = now.date()
        self._next_cleanup = now

    def turn(self, now: datetime.datetime) -> None:
        """Call every few seconds."""
        if self._log.output != "file":
            return
        if now.date() != self._day:
            archive = self._file.with_name(f"{self._file.stem}-{self._day.isoformat()}{self._file.suffix}")
            if self._file.exists() and not archive.exists():
                self._file.rename(archive)
            self._day = now.date()
        if now >= self._next_cleanup:
            self._next_cleanup = now + datetime.timedelta(seconds=self._log.cleanup_interval_secs)
            for archive in self.expired(now):
                archive.unlink(missing_ok=True)

    def expired(self, now: datetime.datetime) -> list[Path]:
        """Archives past their age, then the oldest of the rest until their sum fits."""
        archives = []
        for path in self._file.parent.glob(f"{self._file.stem}-*{self._file.suffix}"):
            try:
                day = datetime.date.fromisoformat(path.stem.removeprefix(f"{self._file.stem}-"))
            except ValueError:
                continue  # not one of ours
            archives.append((day, path))
        archives.sort(reverse=True)
        oldest = now.date() - datetime.timedelta(days=self._log.max_age_days)
        room = self._log.max_total_size_mb * 1024 * 1024
        gone = []
        for day, path in archives:
            room -= path.stat().st_size
            if day < oldest or room < 0:
                gone.append(path)
        return gone
