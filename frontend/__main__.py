"""`python -m frontend RUN_DIR --index K --life L --listen-fd N`: one frontend process, started by the supervisor."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import signal
from pathlib import Path

import uvloop

from broker import config, files, log
from broker.faces import face_of
from frontend.app import serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m frontend", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--index", type=int, required=True, help="row of counters")
    parser.add_argument("--life", type=int, required=True, help="how many frontends have had this row")
    parser.add_argument("--listen-fd", type=int, required=True, help="the shared listening socket")
    parser.add_argument("--ready-fd", type=int, default=-1, help='"ready\\n" is written here when accepting')
    parser.add_argument("--alive-fd", type=int, default=-1, help="its end of file means that the supervisor died")
    given = parser.parse_args()
    # Ctrl-C goes to the whole process group; the supervisor alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = config.parse((given.run_dir / "config.json").read_bytes())
    log.setup(settings.log, f"frontend-{given.index}", face_of(settings))
    files.allow_most()
    tame_collector()
    tame_allocator()
    uvloop.run(serve(given.run_dir, settings, given.index, given.life, given.listen_fd, given.ready_fd, given.alive_fd))


def tame_collector() -> None:
    """What was imported lives for ever: it is taken out of every later collection. And requests leave few cycles, so
    the young generation is looked at every 20,000 containers instead of every 700, the old one a hundred times more
    rarely: under streams the collector took 20 % of a process that did neither."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def tame_allocator() -> None:
    """Memory of bodies is kept for the next ones, up to 8 MiB. glibc gives the top of its heap back when 128 KiB of it
    are free and asks for it again at once: with bodies of 32 KiB one to six page faults a request, now one in a
    hundred."""
    with contextlib.suppress(OSError, AttributeError):  # another libc, which has other ways
        set_option = ctypes.CDLL(None).mallopt
        set_option(M_TRIM_THRESHOLD, 8 << 20)
        set_option(M_TOP_PAD, 1 << 20)
        set_option(M_MMAP_THRESHOLD, 1 << 20)


if __name__ == "__main__":
    main()
