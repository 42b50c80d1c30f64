"""That `make cluster-demo` shows what it promises, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import secrets
import signal
from pathlib import Path

import psutil

from tests.support.processes import ROOT, Program
from tests.support.waiting import until

MARK = "PENSTOCK_DEMO_TEST"


def test_the_demo_shows_hosts_that_help_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    environment = {**os.environ, MARK: mark, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    demo = Program("demo", ["-m", "tests.chaos.demo"], tmp_path, environment)

    def helped() -> bool:
        assert demo.popen.poll() is None, demo.output
        return any(int(count) for count in re.findall(r"\((\d+) elsewhere\)", demo.output))

    until(helped, lambda: f"requests that ran at another host:\n{demo.output}")
    demo.signal(signal.SIGINT)
    assert demo.await_exit(60.0) == 0, demo.output
    assert "no process is left" in demo.output
    left = [process for process in psutil.process_iter() if _has(process, mark)]
    assert left == []


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:
        return False
