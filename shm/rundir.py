"""One directory per run, `<parent>/<prefix>-<8 hex>`, and the lock that says whether its owner lives.

The lock (`flock` on the file `lock`) is held by the owner's open file and dies with the owner, however it dies. So
the next start can tell a directory that was left behind from one in use, without pids that may have been reused.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Self

LOCK = "lock"
_LONGEST_PATH = 107 - len("/control.sock")  # sun_path of a unix socket holds 108 bytes with its final zero
_UNFINISHED_S = 60.0


class RunDirectoryError(Exception):
    """The run directory cannot be made."""


class RunDirectory:
    """The directory of this run. Exactly one process, its owner, has this object; children get the path."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def create(cls, parent: str | os.PathLike[str], prefix: str) -> Self:
        """Make and lock a new directory. Raises RunDirectoryError."""
        path = Path(parent) / f"{prefix}-{secrets.token_hex(4)}"
        if len(os.fsencode(path)) > _LONGEST_PATH:
            raise RunDirectoryError(
                f"the shared-memory directory {parent} has too long a name: unix sockets below it would pass "
                "the system's 107 bytes"
            )
        # Locked under a hidden name first, else: (1) we make the directory, (2) another start finds it, sees its
        # lock free and removes it, (3) we lock a file that is gone.
        hidden = path.with_name(f".{path.name}")
        try:
            hidden.mkdir(mode=0o700)
            fd = os.open(hidden / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, f"{os.getpid()}\n".encode())
            hidden.rename(path)
        except OSError as error:
            raise RunDirectoryError(f"cannot make a run directory in {parent}: {error.strerror}") from error
        return cls(path, fd)

    def remove(self) -> None:
        """Remove the directory and let the lock go. Idempotent. Memory that others still map stays theirs."""
        if self._lock_fd < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"


def is_owned(path: str | os.PathLike[str]) -> bool:
    """Whether the owner of run directory `path` lives."""
    try:
        fd = _lock(Path(path))
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    os.close(fd)
    return False


def remove_stale(parent: str | os.PathLike[str], prefix: str) -> list[Path]:
    """Remove this user's directories `<prefix>-*` whose lock is free; returns them.

    Two starts may clean at once: whoever gets the lock removes.
    """
    removed = []
    for path in sorted(Path(parent).glob(f"{prefix}-*")) + sorted(Path(parent).glob(f".{prefix}-*")):
        try:
            status = path.lstat()
            if status.st_uid != os.geteuid() or not path.is_dir() or path.is_symlink():
                continue
            if path.name.startswith(".") and time.time() - status.st_mtime < _UNFINISHED_S:
                continue  # between its mkdir and its lock
            fd = _lock(path)
        except OSError:
            continue
        shutil.rmtree(path, ignore_errors=True)
        os.close(fd)
        removed.append(path)
    return removed


def _lock(path: Path) -> int:
    """The open lock file of `path`, locked by us. OSError: there is none, or somebody lives."""
    fd = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd
