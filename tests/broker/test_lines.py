"""Lines that pass by `logging` are what it would have written, and go where its records go."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest

from broker import batched
from broker.lines import MAX_RECORDS, Line, Lines

FORMAT = "%(levelname)s %(name)s %(message)s"
NAME = "penstock.test_lines"


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, without pytest's handlers."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers[:] = []
    root.setLevel(logging.INFO)
    yield root
    batched.stop()
    root.handlers[:] = before[0]
    root.setLevel(before[1])


def stream(root: logging.Logger, level: int = logging.NOTSET) -> io.StringIO:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.setLevel(level)
    root.addHandler(handler)
    return out


def test_lines_and_records_are_written_together_in_their_order(root: logging.Logger) -> None:
    out, errors = stream(root), stream(root, logging.ERROR)

    async def run() -> None:
        batched.start(asyncio.get_running_loop())
        lines = Lines(NAME)
        lines.write("one")
        logging.getLogger("other").warning("two %d", 2)
        lines.write("three %d")
        assert not out.getvalue()
        batched.stop()

    asyncio.run(run())
    assert out.getvalue() == f"INFO {NAME} one\nWARNING other two 2\nINFO {NAME} three %d\n"
    assert not errors.getvalue()


def test_they_are_written_when_there_are_too_many(root: logging.Logger) -> None:
    out = stream(root)

    async def run() -> None:
        batched.start(asyncio.get_running_loop())
        lines = Lines(NAME)
        for _ in range(MAX_RECORDS + 1):
            lines.write("line")
        assert out.getvalue().count("\n") == MAX_RECORDS
        batched.stop()

    asyncio.run(run())
    assert out.getvalue().count("\n") == MAX_RECORDS + 1


def test_an_error_is_written_at_once_and_behind_them(root: logging.Logger) -> None:
    out = stream(root)

    async def run() -> None:
        batched.start(asyncio.get_running_loop())
        Lines(NAME).write("line")
        logging.getLogger("other").error("wrong")
        assert out.getvalue() == f"INFO {NAME} line\nERROR other wrong\n"

    asyncio.run(run())


def test_a_handler_that_comes_later_hears_them(root: logging.Logger) -> None:
    out = stream(root)

    async def run() -> None:
        batched.start(asyncio.get_running_loop())
        lines = Lines(NAME)
        lines.write("one")
        late = stream(root)
        lines.write("two")
        assert late.getvalue() == f"INFO {NAME} two\n"
        root.handlers.pop()
        lines.write("three")
        assert late.getvalue() == f"INFO {NAME} two\n"
        batched.stop()
        lines.write("four")

    asyncio.run(run())
    assert out.getvalue().split() == [word for n in ("one", "two", "three", "four") for word in ("INFO", NAME, n)]


def test_a_level_that_changes_is_seen(root: logging.Logger) -> None:
    lines = Lines(NAME)
    for level in (logging.INFO, logging.WARNING, logging.INFO):
        root.setLevel(level)
        for _ in range(2):  # `logging` remembers it from the first time on
            assert lines.is_on == logging.getLogger(NAME).isEnabledFor(logging.INFO) == (level == logging.INFO)


@pytest.mark.parametrize("shape", ["%(asctime)s {} %(name)s: ", "%(asctime)s a,000 %(name)s: ", "%(name)s: "])
def test_each_line_has_its_own_time(root: logging.Logger, shape: str) -> None:
    out = io.StringIO()
    target = logging.StreamHandler(out)
    target.setFormatter(logging.Formatter(shape + "%(message)s"))
    times = [1000.0, 1000.001, 1000.05, 1000.999, 1001.0, 1000.5, 1700000000.123, 1700000000.9999]

    async def run() -> None:
        handler = batched.Batched(target)
        handler.start(asyncio.get_running_loop())
        for created in times:
            handler.pending.add(Line(created, NAME, "text"))
        handler.pending.add(Line(times[-1], "other", "text"))
        handler.stop()

    asyncio.run(run())
    expected = []
    for created, name in [*[(created, NAME) for created in times], (times[-1], "other")]:
        record = logging.LogRecord(name, logging.INFO, "", 0, "text", None, None)
        record.created, record.msecs = created, float(int(created * 1000) % 1000)
        expected.append(target.format(record) + "\n")
    assert out.getvalue() == "".join(expected)
