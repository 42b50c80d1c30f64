"""What the kernel says about processes and about the machine: CPU time, memory, and who else is at work."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


def family(pid: int) -> list[int]:
    """The process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def cpu_s(pids: list[int]) -> dict[int, float]:
    """CPU seconds each process has used, user and system. Counted exactly by the kernel; only the unit is coarse."""
    return {p: (int(f[11]) + int(f[12])) / TICKS_PER_S for p in pids if (f := _stat(p))}


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return text[text.rindex(")") + 2 :].split()


@dataclass(frozen=True)
class Memory:
    """Of some processes together, in KiB."""

    private: int
    """USS: what would be freed if they ended."""
    shared: int
    """Their share of shared-memory segments."""


def memory(pids: list[int]) -> Memory:
    private = shared = 0
    for pid in pids:
        try:
            lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kib = {words[0]: int(words[1]) for line in lines if len(words := line.split()) == 3 and words[2] == "kB"}
        private += kib.get("Private_Clean:", 0) + kib.get("Private_Dirty:", 0)
        shared += kib.get("Pss_Shmem:", 0)
    return Memory(private, shared)


def label(pid: int) -> str:
    """What the process is, in up to three words without folders: `python -m frontend`."""
    try:
        text = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "gone"
    words = [word for word in text.split() if word != "-P"]
    return " ".join(word.rpartition("/")[2] for word in words[:3])


@dataclass(frozen=True)
class Usage:
    """Of the whole machine since its start, in CPU seconds; `at` is wall-clock seconds."""

    at: float
    busy: float
    stolen: float

    @classmethod
    def now(cls) -> Usage:
        fields = [int(x) / TICKS_PER_S for x in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields
        return cls(time.monotonic(), user + nice + system + irq + softirq, steal)


def wait_for_quiet(limit: float, patience_s: float) -> float:
    """Waits until all processes together use less than `limit` cores, or patience ends. Returns the last value."""
    end = time.monotonic() + patience_s
    while True:
        before = Usage.now()
        time.sleep(0.5)
        after = Usage.now()
        share = (after.busy - before.busy) / (after.at - before.at)
        if share < limit or after.at > end:
            return share


def describe() -> dict[str, str]:
    """The machine, for the head of a table."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    memory_kib = next((line.split()[1] for line in _lines("meminfo") if line.startswith("MemTotal")), "0")
    return {
        "cpu": f"{os.cpu_count()} x {cpu}",
        "memory": f"{int(memory_kib) // 1024 // 1024} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _lines(name: str) -> list[str]:
    return (PROC / name).read_text().splitlines()
