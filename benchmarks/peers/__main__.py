"""`python -m benchmarks.peers`: install what is missing, run the matrix, print the tables.

Options come from the environment too, in capitals, as `make bench-peers` passes them: ROUNDS, ONLY, SCENARIOS, MODES.
FD_ROUTER=path adds FastDeploy's Go router.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from benchmarks.peers import install, report
from benchmarks.peers.machine import describe
from benchmarks.peers.measure import Sample
from benchmarks.peers.process import share_niceness
from benchmarks.peers.rounds import MODES, Plan, run
from benchmarks.peers.routers import ROOT, ROUTERS, Launch
from benchmarks.peers.scenarios import SCENARIOS


def main() -> None:
    options = _options()
    if options.report:
        report.show(json.loads(Path(options.report).read_text()))
        return
    if options.nice:
        os.nice(options.nice)
        share_niceness()
    signal.signal(signal.SIGTERM, _end)
    missing = _missing()
    names = _chosen(options.only, ROUTERS)
    for name in names:
        if reason := missing.get(ROUTERS[name].family):
            _say(f"{name} left out: {reason}")
    plan = Plan(
        routers=[ROUTERS[n] for n in names if ROUTERS[n].family not in missing],
        scenarios=_chosen(options.scenarios, SCENARIOS) if options.scenarios else [],
        modes=[MODES[n] for n in _chosen(options.modes, MODES)],
        rounds=options.rounds,
        seconds=options.seconds,
        noise=options.noise,
        retries=options.retries,
        patience_s=options.patience,
    )
    _measure(plan, Path(options.results))


def _end(*_: object) -> None:
    """Every child is stopped on the way out; a second signal must not cut that short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _measure(plan: Plan, results: Path) -> None:
    """Everything measured so far is saved, and shown, even when the run is cut short."""
    results.mkdir(parents=True, exist_ok=True)
    target = results / f"peers-{time.strftime('%Y%m%d-%H%M%S')}.json"
    folder = Path(tempfile.mkdtemp(prefix="penstock-peers-"))
    routers: dict[str, dict[str, object]] = {}
    samples: list[Sample] = []
    head = {
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "machine": describe(),
        "plan": {"rounds": plan.rounds, "seconds": plan.seconds, "noise": plan.noise, "retries": plan.retries},
    }

    def started(mode: str, launch: Launch) -> None:
        _say(f"{mode}: {launch.label} answers")
        shown = [word.replace(str(ROOT), ".").replace(str(folder), "$dir") for word in launch.command]
        files = {name: text.replace(str(folder), "$dir") for name, text in launch.files.items()}
        routers[f"{mode} {launch.label}"] = {"command": shown, "files": files}

    try:
        for sample in run(plan, folder, _say, started):
            samples.append(sample)
            if sample["scenario"] != "idle":
                _say(report.line(sample))
    finally:
        measured = {**head, "routers": routers, "samples": samples}
        target.write_text(json.dumps(measured, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        if samples:
            report.show(measured)
            print(f"\n{target}")


def _missing() -> dict[str, str]:
    """Family of routers -> why there is none."""
    missing = install.install()
    if "native_engine" in missing:
        _say(f"native engine left out: {missing['native_engine']}")
    if not os.environ.get("FD_ROUTER"):
        missing["fd-router"] = "FD_ROUTER names no binary"
    if not (ROOT / ".venv/bin/penstock").exists():
        missing["penstock"] = "make install comes first"
    return missing


def _chosen(given: str, known: Collection[str]) -> list[str]:
    """The names in `given`, or all that are known."""
    names = [n for n in given.replace(",", " ").split() if n] or list(known)
    for name in names:
        if name not in known:
            sys.exit(f"unknown: {name}; known: {', '.join(known)}")
    return names


def _options() -> argparse.Namespace:
    env = os.environ.get
    p = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    p.add_argument("--only", default=env("ONLY", ""), help=f"routers, of {', '.join(ROUTERS)}")
    p.add_argument("--scenarios", default=env("SCENARIOS", ""), help=f"of {', '.join(SCENARIOS)}")
    p.add_argument("--modes", default=env("MODES", ""), help=f"of {', '.join(MODES)}")
    p.add_argument("--rounds", type=int, default=int(env("ROUNDS") or 5))
    p.add_argument("--seconds", type=float, default=3.0, help="length of a sample")
    p.add_argument("--noise", type=float, default=0.15, help="share of a core that others may have had")
    p.add_argument("--retries", type=int, default=3, help="times a noisy sample is taken again")
    p.add_argument("--patience", type=float, default=6.0, help="seconds to wait for a quiet machine before a sample")
    p.add_argument("--nice", type=int, default=0, help="for example -15, as root")
    p.add_argument("--results", default=str(ROOT / "benchmarks/results"))
    p.add_argument("--report", help="print the tables of this result file and measure nothing")
    return p.parse_args()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
