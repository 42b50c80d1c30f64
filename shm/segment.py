"""Named blocks of int64 cells or bytes in one mapped file.

    offset 0            8        16       24      32          40     48          56            64
           | magic     | version | digest | epoch | writer pid | size | created ns | text bytes | layout as JSON ...
           +--- padded to whole pages ---------------------------------------------------------------------------
           | block 0 (64-byte aligned, or on a page of its own) | block 1 | ...

The layout travels in the file, so that `python -m shm PATH` can dump any segment; the digest of that text is what
a reader compares, so two builds that differ in a single column never share memory by mistake.

Cells are touched through `memoryview.cast('q')` or aligned native int64 numpy arrays and nothing else: both move
eight bytes in one instruction. `struct.pack_into` does not (it zeroes first), nor do byte-order formats.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

MAGIC = int.from_bytes(b"PENSTOCK", "little")
PAGE = mmap.ALLOCATIONGRANULARITY
ALIGNMENT = 64

_VERSION, _DIGEST, _EPOCH, _PID, _SIZE, _CREATED, _TEXT = range(1, 8)
_TEXT_AT = 64
_ITEM = {"q": 8, "B": 1}


class SegmentError(Exception):
    """Root of what can go wrong with a segment."""


class SegmentMissing(SegmentError):
    """There is no file of that name."""


class SegmentMismatch(SegmentError):
    """The file is no segment, or one of another build; the message names the field that differs."""


class SegmentSpace(SegmentError):
    """The shared-memory directory cannot hold the segment."""


class Block(NamedTuple):
    """One array of a segment.

    `kind` is "q" (int64 cells) or "B" (bytes). `paged` puts every index of the first axis on pages of its own, so
    that one row can be mapped writable alone. `labels` name the indices of axis `labelled`; they are part of the
    layout: a column that moves or changes its name makes another layout.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["q", "B"] = "q"
    paged: bool = False
    labels: tuple[str, ...] = ()
    labelled: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes from one index of the first axis to the next."""
        size = prod(self.shape[1:]) * _ITEM[self.kind]
        return _round_up(size, PAGE) if self.paged else size

    @property
    def size(self) -> int:
        return self.shape[0] * self.row_bytes


class Layout:
    """The blocks of a segment and where they lie; equal digests mean equal layouts, in every process."""

    def __init__(self, name: str, version: int, blocks: Sequence[Block]) -> None:
        self.name = name
        self.version = version
        self.blocks = tuple(blocks)
        for block in self.blocks:
            if not block.shape or min(block.shape) < 1 or block.kind not in _ITEM:
                raise ValueError(f"block {block.name!r} of layout {name!r} has no cells: {block}")
        self.text = json.dumps(
            {"name": name, "version": version, "page": PAGE, "blocks": [list(b) for b in self.blocks]},
            separators=(",", ":"),
        ).encode()
        self.digest = int.from_bytes(hashlib.blake2b(self.text, digest_size=8).digest(), "little", signed=True)
        self._places: dict[str, tuple[Block, int]] = {}
        end = _round_up(_TEXT_AT + len(self.text), PAGE)
        for block in self.blocks:
            start = _round_up(end, PAGE if block.paged else ALIGNMENT)
            self._places[block.name] = (block, start)
            end = start + block.size
        if len(self._places) != len(self.blocks):
            raise ValueError(f"layout {name!r} names a block twice")
        self.size = _round_up(end, PAGE)

    @classmethod
    def from_text(cls, text: bytes) -> Layout:
        """The layout that a header carries."""
        try:
            fields = json.loads(text)
            blocks = [Block(n, tuple(s), k, p, tuple(ls), ax) for n, s, k, p, ls, ax in fields["blocks"]]
            layout = cls(fields["name"], fields["version"], blocks)
        except (ValueError, KeyError, TypeError) as error:
            raise SegmentMismatch(f"the layout in the header cannot be read: {error}") from error
        return layout

    def block(self, name: str) -> Block:
        return self._places[name][0]

    def offset(self, name: str) -> int:
        return self._places[name][1]

    def __repr__(self) -> str:
        return f"Layout({self.name!r}, version={self.version}, size={self.size})"


class Segment:
    """A mapped segment. Arrays and views taken from it stay valid after `close`; the mapping goes with the last."""

    def __init__(self, path: Path, layout: Layout, fd: int, *, writable: bool) -> None:
        self.path = path
        self.layout = layout
        self.writable = writable
        self._fd = fd
        self._map = mmap.mmap(fd, layout.size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        self._header = memoryview(self._map)[:_TEXT_AT].cast("q")

    # -- making and finding ------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | os.PathLike[str], layout: Layout) -> Segment:
        """A new zeroed segment, writable. It appears under `path` only when it is complete.

        Raises SegmentSpace when the directory cannot hold it, SegmentError when `path` is taken.
        Memory is reserved now: a mapped page that the mount cannot back would kill the process later, by SIGBUS.
        """
        path = Path(path)
        if path.exists():
            raise SegmentError(f"{path} exists already")
        building = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fd = os.open(building, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SegmentError(f"cannot create {path}: {error.strerror}") from error
        try:
            try:
                os.posix_fallocate(fd, 0, layout.size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
                    raise
                raise SegmentSpace(
                    f"the shared-memory directory {path.parent} cannot hold {layout.size} bytes for segment "
                    f"{layout.name!r}: {error.strerror}; enlarge it, choose another one, or lower the capacities"
                ) from error
            header = np.zeros(_TEXT_AT // 8, dtype=np.int64)
            header[0] = MAGIC
            header[_VERSION] = layout.version
            header[_DIGEST] = layout.digest
            header[_SIZE] = layout.size
            header[_CREATED] = time.time_ns()
            header[_TEXT] = len(layout.text)
            os.pwrite(fd, header.tobytes() + layout.text, 0)
            segment = cls(path, layout, fd, writable=True)
            os.rename(building, path)
        except BaseException:
            os.unlink(building)
            os.close(fd)
            raise
        return segment

    @classmethod
    def attach(cls, path: str | os.PathLike[str], layout: Layout | None = None, *, writable: bool = False) -> Segment:
        """Map an existing segment, read-only unless `writable`.

        Without `layout` the header's own is taken. Raises SegmentMissing, SegmentMismatch.
        """
        path = Path(path)
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise SegmentMissing(f"there is no segment {path}") from error
        except OSError as error:
            raise SegmentError(f"cannot open segment {path}: {error.strerror}") from error
        try:
            found = _read_layout(path, fd)
            if layout is not None:
                _compare(path, layout, found)
            return cls(path, found, fd, writable=writable)
        except BaseException:
            os.close(fd)
            raise

    # -- the header --------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """How many writers have taken this segment over; 0 = none yet."""
        return self._header[_EPOCH]

    @property
    def writer_pid(self) -> int:
        """The process that took it over last; 0 = none yet."""
        return self._header[_PID]

    @property
    def created_ns(self) -> int:
        """Wall-clock time of its making."""
        return self._header[_CREATED]

    def take_over(self, pid: int) -> int:
        """Become its writer; returns the new epoch. Only the one writer calls this, after its predecessor died."""
        self._header[_PID] = pid
        self._header[_EPOCH] += 1
        return self._header[_EPOCH]

    # -- the blocks --------------------------------------------------------------------------------------------

    def array(self, name: str) -> NDArray[np.int64]:
        """The cells of block `name`; not writeable when the mapping is read-only."""
        block = self._of_kind(name, "q")
        return _shaped(self._map, self.layout.offset(name), block.shape, block.row_bytes)

    def cells(self, name: str) -> memoryview:
        """The same cells in one flat row of ints: the fastest access to a single one. Not for paged blocks."""
        block = self._of_kind(name, "q")
        if block.paged:
            raise ValueError(f"block {name!r} is paged: its rows do not lie side by side")
        start = self.layout.offset(name)
        return memoryview(self._map)[start : start + block.size].cast("q")

    def bytes(self, name: str) -> memoryview:
        """The bytes of block `name`, flat."""
        block = self._of_kind(name, "B")
        start = self.layout.offset(name)
        return memoryview(self._map)[start : start + block.size]

    def row_array(self, name: str, index: int) -> NDArray[np.int64]:
        """Row `index` of a paged block, writable, whatever the segment's own mapping allows.

        Nothing else becomes writable with it: one writer per cell, enforced by the memory management unit.
        """
        block = self.layout.block(name)
        mapped = self._map_row(name, index)
        shape = block.shape[1:]
        return np.ndarray(shape, dtype=np.int64, buffer=mapped)

    def row_cells(self, name: str, index: int) -> memoryview:
        """`row_array` as one flat row of ints."""
        block = self.layout.block(name)
        return memoryview(self._map_row(name, index))[: prod(block.shape[1:]) * 8].cast("q")

    def _map_row(self, name: str, index: int) -> mmap.mmap:
        block = self._of_kind(name, "q")
        if not block.paged:
            raise ValueError(f"block {name!r} is not paged: its rows share pages")
        if not 0 <= index < block.shape[0]:
            raise IndexError(f"block {name!r} has rows 0 to {block.shape[0] - 1}, not {index}")
        fd = self._fd if self.writable else os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            offset = self.layout.offset(name) + index * block.row_bytes
            return mmap.mmap(fd, block.row_bytes, offset=offset)
        finally:
            if fd != self._fd:
                os.close(fd)

    def _of_kind(self, name: str, kind: str) -> Block:
        block = self.layout.block(name)
        if block.kind != kind:
            raise ValueError(f"block {name!r} holds {block.kind!r}, not {kind!r}")
        return block

    def close(self) -> None:
        """Let go of the file. Never unlinks: others use it."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        self._header.release()
        with contextlib.suppress(BufferError):  # arrays are in use somewhere; the mapping ends with the last
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        mode = "writable" if self.writable else "read-only"
        return f"Segment({str(self.path)!r}, {self.layout.name!r} v{self.layout.version}, {mode})"


def _shaped(buffer: mmap.mmap, offset: int, shape: tuple[int, ...], row_bytes: int) -> NDArray[np.int64]:
    inner = [prod(shape[axis + 1 :]) * 8 for axis in range(1, len(shape))]
    array: NDArray[np.int64] = np.ndarray(
        shape, dtype=np.int64, buffer=buffer, offset=offset, strides=(row_bytes, *inner)
    )
    return array


def _read_layout(path: Path, fd: int) -> Layout:
    size = os.fstat(fd).st_size
    head = os.pread(fd, _TEXT_AT, 0)
    cells: list[int] = np.frombuffer(head, dtype=np.int64).tolist() if len(head) == _TEXT_AT else [0]
    if cells[0] != MAGIC:
        raise SegmentMismatch(f"{path} is no segment: its magic is not {MAGIC:#x}")
    if size < cells[_SIZE] or not 0 < cells[_TEXT] < cells[_SIZE]:
        raise SegmentMismatch(f"{path} is cut off or damaged: size {size}, its header says {cells[_SIZE]}")
    layout = Layout.from_text(os.pread(fd, cells[_TEXT], _TEXT_AT))
    for field, stored, meant in (
        ("layout version", cells[_VERSION], layout.version),
        ("layout digest", cells[_DIGEST], layout.digest),
        ("size", cells[_SIZE], layout.size),
    ):
        if stored != meant:
            raise SegmentMismatch(f"{path}: {field} is {stored}, its layout gives {meant}")
    return layout


def _compare(path: Path, wanted: Layout, found: Layout) -> None:
    fields: list[tuple[str, Any, Any]] = [
        ("layout name", found.name, wanted.name),
        ("layout version", found.version, wanted.version),
    ]
    there, here = {b.name: b for b in found.blocks}, {b.name: b for b in wanted.blocks}
    fields += [(f"block {name!r}", there.get(name), block) for name, block in here.items()]
    fields.append(("layout digest", found.digest, wanted.digest))
    for field, stored, expected in fields:
        if stored != expected:
            raise SegmentMismatch(f"{path}: {field} is {stored!r}, expected {expected!r}")


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
