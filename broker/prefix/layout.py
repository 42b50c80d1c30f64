"""The segment of the prefix index. One writer: the scheduler.

The blocks of `shm.hashtable`, and

    generations  (slots,)      the generation of each slot that the index knows; 0 = none, -1 = being forgotten
    applied      (frontends,)  number of the last notice applied from each frontend: what its overlay may forget
"""

from __future__ import annotations

from pathlib import Path

from broker.config import Config
from shm.hashtable import blocks
from shm.segment import Block, Layout, Segment

PREFIX = "prefix"
"""File name in the run directory."""
VERSION = 3
"""Of the layout and of the hash: who makes other keys shares no index."""
CAPACITY = 1 << 20
"""Blocks remembered; 25.5 MiB in all with 1,024 slots."""
POOL = 4096
"""Different sets of more than four instances that are kept exactly."""


def prefix_layout(slots: int, frontends: int, capacity: int = CAPACITY) -> Layout:
    """`capacity` blocks, rounded up to a power of two."""
    return Layout(
        PREFIX,
        VERSION,
        [
            *blocks(capacity, slots, POOL),
            Block("generations", (slots,)),
            Block("applied", (frontends,)),
        ],
    )


def run_layout(config: Config) -> Layout:
    """The layout that these settings ask for."""
    return prefix_layout(config.shm.slots, config.shm.frontends, config.scheduler.prefix_blocks)


def create_prefix(run_dir: Path, layout: Layout) -> None:
    """Make the segment in the run directory. Raises SegmentError; SegmentSpace when the mount is too small."""
    Segment.create(run_dir / PREFIX, layout).close()
