"""`python -m shm PATH`: what a segment holds. Reads only, so it may be used on a running system."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from shm.segment import Block, Segment, SegmentError, SegmentMismatch

DEFAULT_DIRECTORY = Path("/dev/shm")


def main(argv: list[str] | None = None) -> int:
    """Dump a segment, or every segment of a run directory; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shm", description="Dump shared-memory segments.")
    parser.add_argument(
        "path",
        help=f"a segment, a run directory, or the name of either below {DEFAULT_DIRECTORY}",
    )
    parser.add_argument("--block", metavar="NAME", help="only this block")
    parser.add_argument("--all", action="store_true", help="also cells that are 0")
    arguments = parser.parse_args(argv)
    try:
        for path in find(arguments.path, arguments.block):
            with Segment.attach(path) as segment:
                for line in dump(segment, only=arguments.block, zeros=arguments.all):
                    print(line)
    except SegmentError as error:
        print(f"python -m shm: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` has seen enough; keep the interpreter's own flush from saying it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def find(name: str, block: str | None = None) -> list[Path]:
    """The segments that `name` means, with `block` only those that have it. Raises SegmentError when there are none."""
    path = Path(name)
    if not path.exists() and len(path.parts) == 1:
        path = DEFAULT_DIRECTORY / name
    if path.is_dir():
        segments = [entry for entry in sorted(path.iterdir()) if entry.is_file() and _is_segment(entry)]
        if not segments:
            raise SegmentError(f"no segment in the directory {path}")
    else:
        segments = [path]
    if block is not None:
        segments = [segment for segment in segments if _has(segment, block)]
        if not segments:
            raise SegmentError(f"{path} has no block {block!r}")
    return segments


def _has(path: Path, block: str) -> bool:
    with Segment.attach(path) as segment:
        return block in {b.name for b in segment.layout.blocks}


def _is_segment(path: Path) -> bool:
    try:
        Segment.attach(path).close()
    except SegmentMismatch:
        return False
    return True


def dump(segment: Segment, *, only: str | None = None, zeros: bool = False) -> Iterator[str]:
    """The header, the blocks, and the cells that are not 0, line by line."""
    layout = segment.layout
    pid = segment.writer_pid
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(segment.created_ns / 1e9))
    digest = layout.digest & 2**64 - 1
    yield f"segment {segment.path}: layout {layout.name!r} version {layout.version}, digest {digest:#x}"
    yield f"  {layout.size} bytes, created {created}, epoch {segment.epoch}, writer {_owner(pid)}"
    for block in layout.blocks:
        if only is not None and block.name != only:
            continue
        kind = "int64" if block.kind == "q" else "bytes"
        paged = ", rows on pages of their own" if block.paged else ""
        yield f"block {block.name} {block.shape} {kind} at {layout.offset(block.name)}{paged}"
        yield from _cells(segment, block, zeros) if block.kind == "q" else _bytes(segment, block)


def _owner(pid: int) -> str:
    if pid == 0:
        return "none yet"
    return f"pid {pid}" if Path(f"/proc/{pid}").exists() else f"pid {pid} (gone)"


def _cells(segment: Segment, block: Block, zeros: bool) -> Iterator[str]:
    cells = segment.array(block.name)
    shown = np.ones(block.shape, dtype=np.bool_) if zeros else cells != 0
    for index in np.argwhere(shown).tolist():
        place = [str(i) for i in index]
        if block.labels:
            place[block.labelled] = block.labels[index[block.labelled]]
        yield f"  {block.name}[{', '.join(place)}] = {cells[tuple(index)]}"


def _bytes(segment: Segment, block: Block) -> Iterator[str]:
    width = prod(block.shape[1:])
    view = segment.bytes(block.name)
    for row in range(block.shape[0]):
        content = bytes(view[row * width : (row + 1) * width]).rstrip(b"\0")
        if content:
            yield f"  {block.name}[{row}] = {len(content)} bytes {content[:96]!r}"


if __name__ == "__main__":
    sys.exit(main())
