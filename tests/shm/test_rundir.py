"""Run directories: whose they are, and who may remove them."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from shm import rundir
from shm.rundir import RunDirectory, RunDirectoryError, is_owned, remove_stale
from tests.support.children import child, kill
from tests.support.waiting import until


@pytest.fixture
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short enough for unix sockets."""
    return tmp_path_factory.mktemp("r")


def _own(parent: Path) -> None:
    mine = RunDirectory.create(parent, "run-1")
    (mine.path / "load").write_bytes(b"x")
    signal.pause()


def test_a_run_directory_is_owned_until_it_is_removed(parent: Path) -> None:
    with RunDirectory.create(parent, "run-1") as mine:
        assert mine.path.parent == parent
        assert mine.path.name.startswith("run-1-")
        assert mine.path.stat().st_mode & 0o777 == 0o700
        assert is_owned(mine.path)
        assert remove_stale(parent, "run-1") == []
        (mine.path / "load").write_bytes(b"x")
    assert os.listdir(parent) == []
    assert not is_owned(mine.path)
    mine.remove()


def test_two_runs_stand_side_by_side(parent: Path) -> None:
    with RunDirectory.create(parent, "run-1") as one, RunDirectory.create(parent, "run-1") as other:
        assert one.path != other.path
        assert remove_stale(parent, "run-1") == []


def test_a_killed_owner_leaves_a_directory_that_the_next_start_removes(parent: Path) -> None:
    with child(_own, parent) as process:
        until(lambda: len(list(parent.glob("run-1-*/load"))) == 1, "the child owns a directory")
        (path,) = parent.iterdir()
        assert is_owned(path)
        assert remove_stale(parent, "run-1") == []
        kill(process)
    assert not is_owned(path)
    assert remove_stale(parent, "run-1") == [path]
    assert os.listdir(parent) == []


def test_other_prefixes_are_left_alone(parent: Path) -> None:
    for name in ("run-10-abcd", "run", "other-1-abcd", "run-1"):
        (parent / name).mkdir()
        (parent / name / "lock").touch()
    (parent / "run-1-file").touch()
    (parent / "run-1-nolock").mkdir()
    assert remove_stale(parent, "run-1") == []
    assert len(os.listdir(parent)) == 6


def test_a_link_is_not_followed(parent: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "lock").touch()
    (parent / "run-1-link").symlink_to(precious)
    assert remove_stale(parent, "run-1") == []
    assert precious.exists()


def test_a_half_made_directory_is_removed_only_when_it_is_old(parent: Path) -> None:
    hidden = parent / ".run-1-abcd"
    hidden.mkdir()
    (hidden / "lock").touch()
    assert remove_stale(parent, "run-1") == []
    os.utime(hidden, (1, 1))
    assert remove_stale(parent, "run-1") == [hidden]


def test_a_name_too_long_for_sockets_is_refused(parent: Path) -> None:
    with pytest.raises(RunDirectoryError, match="too long"):
        RunDirectory.create(parent / ("x" * 100), "run-1")


def test_a_parent_that_is_missing_is_named(parent: Path) -> None:
    shutil.rmtree(parent)
    with pytest.raises(RunDirectoryError, match=str(parent)):
        RunDirectory.create(parent, "run-1")


def test_somebody_elses_directory_is_left_alone(parent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (parent / "run-1-abcd").mkdir()
    (parent / "run-1-abcd" / "lock").touch()
    monkeypatch.setattr(rundir.os, "geteuid", lambda: os.getuid() + 1)
    assert remove_stale(parent, "run-1") == []
