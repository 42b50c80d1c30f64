import datetime
import os
from pathlib import Path

import pytest

from broker.config import Log
from broker.log import Rotation

NOON = datetime.datetime(2026, 3, 10, 12, 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "penstock.log"
    path.write_text("today\n")
    return path


def archive(file: Path, day: str, size: int = 1) -> Path:
    path = file.with_name(f"penstock-{day}.log")
    path.touch()
    os.truncate(path, size)
    return path


def test_midnight_renames_the_file_to_the_day_that_ended(file: Path) -> None:
    rotation = Rotation(Log(output="file"), NOON, file)
    rotation.turn(NOON + datetime.timedelta(hours=11))
    assert file.exists()
    rotation.turn(NOON + datetime.timedelta(hours=12))
    assert not file.exists()
    assert file.with_name("penstock-2026-03-10.log").read_text() == "today\n"


def test_archives_go_by_age_and_strangers_stay(file: Path) -> None:
    old, kept = archive(file, "2026-03-02"), archive(file, "2026-03-03")
    stranger = file.with_name("penstock-notes.log")
    stranger.touch()
    rotation = Rotation(Log(output="file", max_age_days=7), NOON, file)
    rotation.turn(NOON)
    assert not old.exists()
    assert kept.exists()
    assert stranger.exists()


def test_the_oldest_archives_go_when_their_sum_is_too_large(file: Path) -> None:
    mib = 1024 * 1024
    oldest, older, newest = (archive(file, f"2026-03-0{day}", mib) for day in (7, 8, 9))
    Rotation(Log(output="file", max_total_size_mb=2), NOON, file).turn(NOON)
    assert not oldest.exists()
    assert older.exists()
    assert newest.exists()


def test_standard_output_is_never_rotated(file: Path) -> None:
    Rotation(Log(), NOON, file).turn(NOON + datetime.timedelta(days=1))
    assert file.exists()
