"""A writer that is killed, or stopped, in the middle of a row; then a successor.

Allowed: the row keeps its previous copy until the successor has written it.
Forbidden: a mixture of two writes; a reader that waits; a row that stays stale although the successor wrote it.
"""

from __future__ import annotations

import os
import signal
from itertools import count
from pathlib import Path

import pytest

from shm.segment import Segment
from shm.seqlock import RowReader, RowWriter
from tests.stress.test_torn_rows import COLUMNS, LAYOUT, SLOTS, UncheckedReader, _cells
from tests.support.children import child, kill
from tests.support.waiting import until


def _write(path: Path) -> None:
    segment = Segment.attach(path, LAYOUT, writable=True)
    writer = RowWriter(segment.cells("sequence"), segment.cells("values"), *_cells(segment))
    half = COLUMNS // 2

    def linger() -> None:
        for _ in range(2000):  # most of the time is spent in the middle of a row
            pass
        for column in range(half, COLUMNS):
            writer.store(slot, column, number)

    for number in count(1):
        slot = number % SLOTS
        writer.write(slot, dict.fromkeys(range(half), number), linger)


def _attach(segment: Segment, kind: type[RowReader]) -> RowReader:
    return kind(segment.array("sequence"), segment.array("values"), *_cells(segment))


def _is_stopped(pid: int | None) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _mixed(reader: RowReader) -> list[int]:
    return [slot for slot, row in enumerate(reader.values.T.tolist()) if len(set(row)) > 1]


def _kills(path: Path, times: int, *, repair: bool, reader_kind: type[RowReader] = RowReader) -> list[str]:
    """Kill writers until `times` of them have left a row torn; returns what was found."""
    Segment.create(path, LAYOUT).close()
    findings: list[str] = []
    torn_by_kills = 0
    with Segment.attach(path, LAYOUT, writable=True) as segment:
        reader = _attach(segment, reader_kind)
        for _ in range(20 * times):
            before = segment.cells("cells")[0]
            with child(_write, path) as process:
                until(lambda before=before: segment.cells("cells")[0] > before + 20, "the writer writes")
                for _ in range(50):
                    reader.refresh()
                kill(process)
            reader.refresh()
            if _mixed(reader):
                findings.append("a torn row was accepted")
            successor = RowWriter(segment.cells("sequence"), segment.cells("values"), *_cells(segment))
            torn = successor.torn()
            torn_by_kills += bool(torn)
            for slot in torn if repair else []:
                successor.write(slot, dict.fromkeys(range(COLUMNS), 7))
            reader.refresh()
            if not reader.complete or any(reader.values[0, slot] != 7 for slot in torn):
                findings.append("a row stays as it was")
            if torn_by_kills == times or findings:
                return findings
    raise AssertionError("no kill fell into a row")


@pytest.mark.parametrize("times", [2, pytest.param(60, marks=pytest.mark.stress)])
def test_a_killed_writer_tears_nothing_and_its_successor_repairs(tmp_path: Path, times: int) -> None:
    assert _kills(tmp_path / "s", times, repair=True) == []


def test_without_repair_the_row_stays_as_it_was(tmp_path: Path) -> None:
    assert _kills(tmp_path / "s", 1, repair=False) == ["a row stays as it was"]


def test_without_the_readers_check_the_torn_row_is_accepted(tmp_path: Path) -> None:
    # A kill between the sequence and the first column tears nothing that could be accepted: then another one is needed.
    runs = (_kills(tmp_path / f"s{k}", 1, repair=True, reader_kind=UncheckedReader) for k in range(5))
    assert any("a torn row was accepted" in findings for findings in runs)


@pytest.mark.parametrize("looks", [2_000, pytest.param(1_000_000, marks=pytest.mark.stress)])
def test_a_stopped_writer_keeps_no_reader_waiting(tmp_path: Path, looks: int) -> None:
    Segment.create(tmp_path / "s", LAYOUT).close()
    with Segment.attach(tmp_path / "s", LAYOUT, writable=True) as segment, child(_write, tmp_path / "s") as process:
        assert process.pid is not None
        reader = _attach(segment, RowReader)
        for _ in range(200):
            until(lambda: segment.cells("cells")[0] > 20, "the writer writes")
            os.kill(process.pid, signal.SIGSTOP)
            until(lambda: _is_stopped(process.pid), "the writer has stopped")
            if any(sequence & 1 for sequence in segment.cells("sequence").tolist()):
                break
            os.kill(process.pid, signal.SIGCONT)
        reader.refresh()
        assert not reader.complete
        stood = reader.values.copy()
        for _ in range(looks):
            assert not reader.refresh()
        assert (reader.values == stood).all()
        assert not _mixed(reader)
        os.kill(process.pid, signal.SIGCONT)
        until(lambda: reader.refresh() and reader.values.max() > stood.max() + SLOTS, "the reader sees it go on")
        assert not _mixed(reader)
