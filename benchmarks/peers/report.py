"""Tables of a run: medians with their spread, ratios to the peers taken within rounds, and the goals."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.peers.goals import judge
from benchmarks.peers.measure import Sample
from benchmarks.peers.rounds import MODES
from benchmarks.peers.samples import Samples
from benchmarks.peers.scenarios import SCENARIOS, Kind

Cell = Callable[[Sequence[Sample]], str]


def show(measured: dict[str, Any]) -> None:
    """Prints everything; `measured` is what a result file holds."""
    samples = Samples(measured["samples"])
    print(f"\n## Routers side by side, {measured['when']}\n")
    print("; ".join(f"{k}: {v}" for k, v in {**measured["machine"], **measured["plan"]}.items()))
    for mode, scenario in samples.cases():
        _table(samples, mode, scenario)
    _ratios(samples)
    _memory(samples)
    _goals(samples)
    _config(measured["routers"])


def line(sample: Sample) -> str:
    """A sample in one line, for the eye while the run goes on."""
    for key, unit in (
        ("cpu_us_per_event", "us/event"),
        ("requests_per_cpu_s", "req/CPU-s"),
        ("kib_per_stream", "KiB/stream"),
    ):
        if key in sample:
            cost = f"{sample[key]:10,.1f} {unit:10}"
            break
    else:
        cost = " " * 21
    troubles = [f"wrong {sample['wrong']} (last status {sample['last_wrong_status']})"] if sample["wrong"] else []
    troubles += [f"/metrics: {d}" for d in sample.get("differences", [])]
    troubles += ["noisy"] if sample["noisy"] else []
    return (
        f"{sample['mode']} r{sample['round']} {sample['scenario']:9} {sample['router']:18} {cost} "
        f"{sample['requests_per_s']:10,.1f} req/s  router {sample['router_share']:.2f} engine "
        f"{sample['engine_share']:.2f} foreign {sample['foreign_share']:.2f} stolen {sample['stolen_share']:.2f} "
        f"attempts {sample['attempts']} {'; '.join(troubles)}"
    )


def _value(key: str, digits: int = 0) -> Cell:
    """Median, and the range when there are several."""

    def cell(samples: Sequence[Sample]) -> str:
        values = [float(s[key]) for s in samples if key in s]
        if not values:
            return "-"
        middle = f"{statistics.median(values):,.{digits}f}"
        return f"{middle} [{min(values):,.{digits}f}..{max(values):,.{digits}f}]" if len(values) > 1 else middle

    return cell


def _pair(first: str, second: str, digits: int = 2) -> Cell:
    def cell(samples: Sequence[Sample]) -> str:
        return " / ".join(f"{statistics.median(float(s[k]) for s in samples):,.{digits}f}" for k in (first, second))

    return cell


def _mebibytes(key: str) -> Cell:
    return lambda samples: f"{statistics.median(s.get(key, 0) for s in samples) / 1024:,.0f}"


def _trouble(samples: Sequence[Sample]) -> str:
    wrong = sum(s["wrong"] for s in samples) + sum(s.get("engine_refused", 0) for s in samples)
    return str(wrong) + (", /metrics differ" if any(s.get("differences") for s in samples) else "")


_ENDS: dict[str, Cell] = {
    "router / engine busy": _pair("router_share", "engine_share"),
    "wrong": _trouble,
    "n": lambda samples: f"{len(samples)}" + (" noisy" if all(s["noisy"] for s in samples) else ""),
}
COLUMNS: dict[Kind, dict[str, Cell]] = {
    Kind.WHOLE: {
        "req per CPU-s": _value("requests_per_cpu_s"),
        "req/s": _value("requests_per_s"),
        "p50 / p99 ms": _pair("latency_p50_ms", "latency_p99_ms", 3),
        "private MiB": _mebibytes("private_kib"),
        **_ENDS,
    },
    Kind.STREAM: {
        "CPU us/event": _value("cpu_us_per_event", 1),
        "events/s": _value("events_per_s"),
        "events a read": _value("events_per_read", 2),
        "first token p50 / p99 ms": _pair("first_p50_ms", "first_p99_ms"),
        "gap p50 / p99 ms": _pair("gap_p50_ms", "gap_p99_ms"),
        **_ENDS,
    },
    Kind.HOLD: {
        "KiB per stream": _value("kib_per_stream", 1),
        "idle MiB": _mebibytes("idle_private_kib"),
        "held MiB": _mebibytes("private_kib"),
        "segments MiB": _mebibytes("shared_kib"),
        **_ENDS,
    },
}


def _table(samples: Samples, mode: str, name: str) -> None:
    scenario = SCENARIOS[name]
    columns = COLUMNS[scenario.kind]
    print(f"\n### {name}, {mode}: {scenario.says}\n\n({MODES[mode].says})\n")
    print(f"| router | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for router in samples.routers(mode, name):
        kept = samples.of(mode, name, router)
        print(f"| {router} | {' | '.join(cell(kept) for cell in columns.values())} |")


def _ratios(samples: Samples) -> None:
    print("\n### Work per CPU second, ours / theirs (medians of the rounds' ratios; above 1 = we need less)\n")
    print("| mode | scenario | ours | theirs | ratio |")
    print("|---" * 5 + "|")
    for mode, scenario in samples.cases():
        routers = samples.routers(mode, scenario)
        for ours in (r for r in routers if r.startswith("penstock")):
            for theirs in (r for r in routers if not r.startswith("penstock") and ("@" in r) == ("@" in ours)):
                ratios = samples.ratios(mode, scenario, ours, theirs, "work_per_cpu_s")
                if ratios:
                    spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}..{max(ratios):.2f}]"
                    print(f"| {mode} | {scenario} | {ours} | {theirs} | {spread} |")


def _memory(samples: Samples) -> None:
    print("\n### Idle memory, before the first load (MiB; shared = its part of shared segments)\n")
    print("| mode | router | process | private | shared |")
    print("|---" * 5 + "|")
    for sample in samples.idle():
        for process in sample["processes"]:
            private, shared = process["private"] / 1024, process["shared"] / 1024
            print(f"| {sample['mode']} | {sample['router']} | {process['process']} | {private:.1f} | {shared:.1f} |")


def _goals(samples: Samples) -> None:
    print("\n### Goals\n")
    print("| case | against | measured | bar | stretch | |")
    print("|---" * 6 + "|")
    for row in judge(samples):
        print(f"| {' | '.join(row)} |")


def _config(routers: dict[str, dict[str, Any]]) -> None:
    print("\n### What ran\n")
    for name, router in routers.items():
        print(f"{name}: `{' '.join(router['command']) or 'no router'}`")
        for file, text in router["files"].items():
            print(f"  {file}:")
            print("\n".join(f"    {row}" for row in text.rstrip().splitlines()))
