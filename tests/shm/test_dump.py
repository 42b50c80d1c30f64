"""`python -m shm`: what it prints, and its errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import shm.__main__ as tool
from shm.segment import Block, Layout, Segment

LAYOUT = Layout(
    "example",
    3,
    [
        Block("cells", (2,), labels=("VERSION", "BEAT")),
        Block("rows", (2, 2, 3), paged=True, labels=("UP", "DOWN"), labelled=1),
        Block("blobs", (2, 10), "B"),
    ],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Segment.create(tmp_path / "s", LAYOUT) as segment:
        segment.cells("cells")[1] = 42
        segment.array("rows")[1, 1, 2] = -7
        segment.bytes("blobs")[10:13] = b"abc"
        segment.take_over(os.getpid())
    return tmp_path / "s"


def test_header_owners_blocks_and_rows_are_shown(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"segment {path}: layout 'example' version 3, digest {LAYOUT.digest & 2**64 - 1:#x}"
    assert lines[1].endswith(f"epoch 1, writer pid {os.getpid()}")
    assert lines[2:] == [
        "block cells (2,) int64 at 4096",
        "  cells[BEAT] = 42",
        "block rows (2, 2, 3) int64 at 8192, rows on pages of their own",
        "  rows[1, DOWN, 2] = -7",
        "block blobs (2, 10) bytes at 16384",
        "  blobs[1] = 3 bytes b'abc'",
    ]


def test_one_block_may_be_asked_for_with_its_zeros(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(path), "--block", "cells", "--all"]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == ["  cells[VERSION] = 0", "  cells[BEAT] = 42"]
    assert tool.main([str(path), "--block", "nonsense"]) == 1
    assert "no block 'nonsense'" in capsys.readouterr().err


def test_a_directory_means_its_segments(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path.parent / "lock").write_text("1\n")
    (path.parent / "config.json").write_text("{}")
    Segment.create(path.parent / "t", Layout("other", 1, [Block("x", (1,))])).close()
    assert tool.main([str(path.parent)]) == 0
    output = capsys.readouterr().out
    assert output.count("segment ") == 2
    assert "layout 'other'" in output


def test_of_a_directory_the_segments_with_the_block_are_shown(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Segment.create(path.parent / "a", Layout("other", 1, [Block("x", (1,))])).close()
    assert tool.main([str(path.parent), "--block", "cells"]) == 0
    output = capsys.readouterr().out
    assert output.count("segment ") == 1
    assert "cells[BEAT] = 42" in output
    assert tool.main([str(path.parent), "--block", "nonsense"]) == 1
    assert "no block 'nonsense'" in capsys.readouterr().err


def test_a_bare_name_is_looked_up_in_the_shared_memory_mount(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "DEFAULT_DIRECTORY", path.parent)
    assert tool.main(["s"]) == 0
    assert "layout 'example'" in capsys.readouterr().out


def test_errors_are_sentences(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").write_bytes(b"hello")
    for name, words in (("none/at/all", "there is no segment"), ("empty", "no segment in"), ("foreign", "magic")):
        assert tool.main([str(tmp_path / name)]) == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("python -m shm: ")
        assert words in captured.err
        assert captured.out == ""


def test_a_writer_that_is_gone_is_called_so(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Segment.attach(path, writable=True) as segment:
        segment.take_over(2**22 + 1)  # above the largest pid
    assert tool.main([str(path)]) == 0
    assert f"epoch 2, writer pid {2**22 + 1} (gone)" in capsys.readouterr().out


def test_it_runs_as_a_module_without_the_rest_of_the_product(path: Path) -> None:
    code = "import sys, runpy; sys.modules['broker'] = None; sys.argv = ['shm', sys.argv[1]]; "
    code += "runpy.run_module('shm', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cells[BEAT] = 42" in done.stdout
