"""`python -m broker.scheduler RUN_DIR [--ready-fd N] [--alive-fd N]`; started by the supervisor."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

import uvloop

from broker import config, files, log
from broker.errors import PenstockError
from broker.faces import face_of
from broker.scheduler.process import Scheduler
from broker.table_writer import TableWriter
from shm.segment import SegmentError

logger = logging.getLogger("scheduler")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m broker.scheduler")
    parser.add_argument("run_dir", type=Path, help="the run's directory, with config.json and the segments")
    parser.add_argument("--ready-fd", type=int, help="`ready` is written there after the first pass over register.yaml")
    parser.add_argument("--alive-fd", type=int, help="its end of file means that the supervisor is gone")
    args = parser.parse_args()
    # The terminal's Ctrl-C reaches the whole process group; the supervisor coordinates.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = config.parse((args.run_dir / "config.json").read_bytes())
    log.setup(settings.log, "scheduler", face_of(settings))
    files.allow_most()
    try:
        with (
            contextlib.closing(TableWriter.attach(args.run_dir, settings)) as table,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(serve(args.run_dir, settings, table, args.ready_fd, args.alive_fd))
    except (SegmentError, PenstockError) as e:
        logger.error("cannot start: %s", e)
        return 1
    return 0


async def serve(
    run_dir: Path, settings: config.Config, table: TableWriter, ready_fd: int | None, alive_fd: int | None
) -> None:
    """Until SIGTERM, or until the supervisor is gone."""
    loop = asyncio.get_running_loop()
    scheduler = Scheduler(run_dir, settings, table)
    loop.add_signal_handler(signal.SIGTERM, scheduler.stop)
    if alive_fd is not None:
        loop.add_reader(alive_fd, scheduler.stop)  # nothing is ever written: readable means its end

    def ready() -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"ready\n")
            os.close(ready_fd)

    await scheduler.run(ready)


if __name__ == "__main__":
    sys.exit(main())
