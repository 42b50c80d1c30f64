"""Which of the two is run in a checkout: its compiled build or its sources."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import ROOT


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with a build of the sources that are there."""
    monkeypatch.delenv("PENSTOCK_COMPILED", raising=False)
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in ("pyproject.toml", "setup.py", "shm/a.py", "broker/b.py", "broker/c/d.lua", "frontend/e.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n")
    shutil.copy(ROOT / "penstock_compiled.py", tmp_path)
    (tmp_path / "build" / "compiled").mkdir(parents=True)
    (tmp_path / "build" / "compiled" / "sources").write_text(started(tmp_path)["sources"]())
    return tmp_path


def started(checkout: Path) -> dict[str, Callable[[], str]]:
    """As at the start of a Python; what the module holds."""
    return runpy.run_path(str(checkout / "penstock_compiled.py"), run_name="penstock_compiled")


def runs_the_build(checkout: Path) -> bool:
    started(checkout)
    return sys.path[-1] == str(checkout / "build" / "compiled")


def _touch(checkout: Path) -> None:
    os.utime(checkout / "broker" / "b.py", ns=(1, 1))


def _write(checkout: Path) -> None:
    (checkout / "broker" / "c" / "d.lua").write_text("22\n")


def _add(checkout: Path) -> None:
    (checkout / "frontend" / "f.py").write_text("")


def _remove(checkout: Path) -> None:
    (checkout / "frontend" / "e.py").unlink()


def _lose_the_build(checkout: Path) -> None:
    shutil.rmtree(checkout / "build")


def test_a_build_of_the_sources_that_are_there_is_run(checkout: Path) -> None:
    assert runs_the_build(checkout)


@pytest.mark.parametrize("change", [_touch, _write, _add, _remove, _lose_the_build])
def test_after_any_change_the_sources_are_run(checkout: Path, change: Callable[[Path], None]) -> None:
    change(checkout)
    assert not runs_the_build(checkout)


def test_what_python_and_setuptools_leave_is_no_change(checkout: Path) -> None:
    (checkout / "shm" / "__pycache__").mkdir()
    (checkout / "shm" / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"")
    (checkout / "shm" / "_twin.cpython-311-x86_64-linux-gnu.so").write_bytes(b"")
    assert runs_the_build(checkout)


def test_the_build_can_be_switched_off(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_COMPILED", "0")
    assert not runs_the_build(checkout)
