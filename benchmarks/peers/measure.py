"""One sample: a scenario run once through one router, with what it cost and what else the machine was doing."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import prompts
from benchmarks.peers.engines import HttpEngines
from benchmarks.peers.http import post
from benchmarks.peers.install import tool
from benchmarks.peers.machine import Memory, Usage, cpu_s, family, label, memory
from benchmarks.peers.process import environment, limit
from benchmarks.peers.routers import Launch
from benchmarks.peers.scenarios import Kind, Pace, Scenario
from benchmarks.peers.totals import Totals, differences

HELD_WITHIN_S = 90.0
Sample = dict[str, Any]
"""A line of the result file. Names end in their unit."""


class Inputs:
    """The files that the load generator reads: bodies, and the answers to expect."""

    def __init__(self, folder: Path, engines: HttpEngines) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        engines.pace(Pace(interval_us=0, first_us=0))
        url = f"{engines.urls[0]}/v1/chat/completions"
        for stream in (False, True):
            body = prompts.one(1024, stream=stream)[0]
            (folder / f"answer-{stream}").write_bytes(post(url, body))

    def options(self, scenario: Scenario) -> list[str]:
        stream = scenario.kind is not Kind.WHOLE
        path = self._folder / f"bodies-{scenario.name}"
        if not path.exists():
            if scenario.cache:
                prompts.save(prompts.sharing_prefixes(stream=stream), path)
            else:
                prompts.save(prompts.one(scenario.body_bytes, stream=stream), path)
        expect = [] if scenario.kind is Kind.HOLD else ["--expect", str(self._folder / f"answer-{stream}")]
        return ["--bodies", str(path), *expect]


class Meter:
    """Takes samples within one mode; `core` is where the load generator may run (None = anywhere)."""

    def __init__(self, inputs: Inputs, core: int | None, seconds: float) -> None:
        self._inputs = inputs
        self._core = core
        self._seconds = seconds

    def sample(self, launch: Launch, scenario: Scenario) -> Sample:
        """Raises OSError or RuntimeError when the load could not be run at all; wrong answers are in the sample."""
        launch.engines.pace(scenario.pace)
        if scenario.kind is Kind.WHOLE:
            self._load(launch, scenario, seconds=0.5)  # connections open, caches warm
        pids = family(launch.process.pid) if launch.process else []
        engine = [launch.engines.process.pid]
        totals = Totals.read(launch.base) if launch.router.ours else None
        before, engine_before, usage, own = cpu_s(pids), cpu_s(engine), Usage.now(), _own_cpu_s()

        if scenario.kind is Kind.HOLD:
            result, held = self._hold(launch, scenario, pids)
        else:
            result, held = self._load(launch, scenario, self._seconds), memory(pids)

        after, engine_after, usage_after = cpu_s(pids), cpu_s(engine), Usage.now()
        own_s = _own_cpu_s() - own
        spent = {p: after[p] - before.get(p, 0.0) for p in after}
        router_s, engine_s = sum(spent.values()), sum(engine_after.values()) - sum(engine_before.values())
        wall = usage_after.at - usage.at
        run = result.pop("run")
        sample: Sample = {
            "router": launch.label,
            "scenario": scenario.name,
            **run,
            **result,
            "wrong": run["wrong_status"] + run["wrong_body"] + run["broken"],
            "cpu_s": round(router_s, 3),
            "router_share": round(router_s / wall, 3),
            "engine_share": round(engine_s / wall, 3),
            "foreign_share": round(max(0.0, usage_after.busy - usage.busy - router_s - engine_s - own_s) / wall, 3),
            "stolen_share": round((usage_after.stolen - usage.stolen) / wall, 3),
            "private_kib": held.private,
            "shared_kib": held.shared,
        }
        if launch.process and run["answered"]:
            sample["requests_per_cpu_s"] = round(run["answered"] / max(router_s, 0.01), 1)
        if launch.process and scenario.kind is Kind.STREAM and run["events"]:
            sample["cpu_us_per_event"] = round(1e6 * router_s / run["events"], 3)
        if scenario.kind is Kind.HOLD and launch.process:
            sample["idle_private_kib"] = launch.idle_private_kib
            sample["kib_per_stream"] = round((held.private - launch.idle_private_kib) / scenario.connections, 2)
        if len(spent) > 1:
            sample["cpu_s_by_process"] = {f"{p} {label(p)}": round(s, 3) for p, s in spent.items()}
        if launch.workers > 1 and len(spent) > 1:
            first, second = sorted(spent.values(), reverse=True)[:2]
            sample["second_share"] = round(second / max(first + second, 0.01), 3)
        if totals:
            sample["differences"] = differences(launch.base, totals, run)
        refused = launch.engines.counts()["refused"]
        if refused:
            sample["engine_refused"] = refused
        return sample

    def _load(self, launch: Launch, scenario: Scenario, seconds: float) -> dict[str, Any]:
        arguments = self._command(launch, scenario)
        arguments += ["--seconds", str(max(seconds, 3.0) if scenario.kind is Kind.STREAM else seconds)]
        arguments += ["--warmup", "0.3", "--ramp-ms", str(scenario.ramp_ms)]
        done = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            timeout=seconds + 60,
            env=environment({}),
            preexec_fn=lambda: limit(self._core),
            check=False,
        )
        return _result(done.stdout, done.stderr)

    def _hold(self, launch: Launch, scenario: Scenario, pids: list[int]) -> tuple[dict[str, Any], Memory]:
        arguments = [*self._command(launch, scenario), "--hold", "--warmup", "0", "--ramp-ms", str(scenario.ramp_ms)]
        with subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment({}),
            preexec_fn=lambda: limit(self._core),
        ) as process:
            assert process.stdout
            if not _readable(process.stdout.fileno(), HELD_WITHIN_S) or process.stdout.readline().strip() != "held":
                process.kill()
                raise RuntimeError(f"{scenario.connections} streams could not be opened")
            time.sleep(2)  # two more events on each stream: buffers have the size that they keep
            held = memory(pids)
            out, err = process.communicate()  # closing its input ends it
        return _result(out, err), held

    def _command(self, launch: Launch, scenario: Scenario) -> list[str]:
        options = ["--port", str(launch.port), "--conns", str(scenario.connections)]
        return [tool("loadgen"), *options, *self._inputs.options(scenario)]


def _result(out: str, err: str) -> dict[str, Any]:
    if not out.strip():
        raise RuntimeError(f"the load generator failed: {err.strip()[-300:]}")
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return result


def _readable(fd: int, patience_s: float) -> bool:
    return bool(select.select([fd], [], [], patience_s)[0])


def _own_cpu_s() -> float:
    """Ours and that of the children that have ended: the load generators."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system
