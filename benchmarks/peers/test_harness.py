"""The harness itself: what it believes, rejects and refuses to overlook."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import install, prompts
from benchmarks.peers.engines import HttpEngines
from benchmarks.peers.goals import judge
from benchmarks.peers.http import post
from benchmarks.peers.process import Children
from benchmarks.peers.samples import Samples
from benchmarks.peers.scenarios import Pace
from benchmarks.peers.totals import Totals, compare

RUN = {"sent": 10, "answered": 8, "wrong_body": 0, "unfinished": 2}
BEFORE = Totals(ok=5, gone=0, attempts=5, retried=0, broken=0, in_flight=0)
AFTER = Totals(ok=15, gone=2, attempts=15, retried=0, broken=0, in_flight=0)


def sample(router: str, round_number: int, **fields: Any) -> dict[str, Any]:
    return {"mode": "pinned", "scenario": "ns32", "router": router, "round": round_number, "noisy": False, **fields}


def test_totals_are_sums_over_instances() -> None:
    text = (
        "# HELP inference_requests_total x\n"
        'inference_requests_total{mixed_worker="a",status_code="200"} 3.0\n'
        'inference_requests_total{mixed_worker="b",status_code="200"} 4.0\n'
        'inference_requests_total{mixed_worker="b",status_code="502"} 1.0\n'
        'penstock_instance_requests_total{instance="a"} 3.0\n'
        'penstock_instance_requests_total{instance="b"} 6.0\n'
    )
    assert Totals.parse(text) == Totals(ok=7, gone=0, attempts=9, retried=0, broken=0, in_flight=0)


def test_equal_totals_have_no_differences() -> None:
    assert compare(BEFORE, AFTER, RUN) == []


@pytest.mark.parametrize("field", ["ok", "gone", "attempts", "broken", "in_flight"])
def test_any_other_total_is_a_difference(field: str) -> None:
    after = Totals(**{**vars(AFTER), field: vars(AFTER)[field] + 1})
    assert len(compare(BEFORE, after, RUN)) == 1


def test_a_noisy_sample_counts_only_where_there_is_no_other() -> None:
    taken = [
        sample("a", 0, requests_per_cpu_s=1.0, noisy=True),
        sample("a", 1, requests_per_cpu_s=3.0),
        sample("b", 0, requests_per_cpu_s=2.0, noisy=True),
    ]
    samples = Samples(taken)
    assert samples.median("pinned", "ns32", "a", "requests_per_cpu_s") == 3.0
    assert samples.median("pinned", "ns32", "b", "requests_per_cpu_s") == 2.0


def test_ratios_are_taken_within_rounds() -> None:
    taken = [
        *(sample("ours", r, requests_per_cpu_s=v) for r, v in enumerate((10.0, 30.0))),
        *(sample("theirs", r, requests_per_cpu_s=v) for r, v in enumerate((5.0, 10.0))),
    ]
    assert Samples(taken).ratios("pinned", "ns32", "ours", "theirs", "work_per_cpu_s") == [2.0, 3.0]


@pytest.mark.parametrize(("ours", "verdict"), [(2.0, "MISSED"), (2.5, "met"), (3.5, "stretch")])
def test_a_goal_is_judged_by_its_bar_and_its_stretch(ours: float, verdict: str) -> None:
    taken = [sample("penstock-rr", 0, requests_per_cpu_s=ours), sample("sgl-rr", 0, requests_per_cpu_s=1.0)]
    [row] = judge(Samples(taken))
    assert row[-1] == verdict


def test_the_cache_prompts_share_prefixes_and_are_the_same_in_every_run() -> None:
    bodies = prompts.sharing_prefixes()
    assert len(set(bodies)) == prompts.PROMPTS
    assert {len(body) for body in bodies} == {prompts.PROMPT_BYTES}
    assert len({body[: prompts.PREFIX_BYTES] for body in bodies}) == prompts.PREFIXES
    assert bodies == prompts.sharing_prefixes()


needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="the tools are C: gcc is needed")


@pytest.fixture
def engines() -> Iterator[HttpEngines]:
    install.build("http_engine")
    install.build("loadgen")
    children = Children()
    try:
        yield HttpEngines(children, None)
    finally:
        children.stop_all()


def load(engines: HttpEngines, folder: Path, expect: bytes, *, stream: bool, **options: int) -> dict[str, Any]:
    bodies = prompts.save(prompts.one(1024, stream=stream), folder / "bodies")
    (folder / "expect").write_bytes(expect)
    command = [install.tool("loadgen"), "--port", str(engines.first_port), "--bodies", str(bodies)]
    command += ["--expect", str(folder / "expect"), "--seconds", "0.2", "--warmup", "0"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@needs_gcc
@pytest.mark.parametrize("stream", [False, True])
def test_the_load_generator_and_the_engine_count_alike(engines: HttpEngines, tmp_path: Path, stream: bool) -> None:
    engines.pace(Pace(events=3, first_us=500, interval_us=500))
    answer = post(f"{engines.urls[0]}/v1/chat/completions", prompts.one(1024, stream=stream)[0])
    run = load(engines, tmp_path, answer, stream=stream, conns=4)["run"]
    assert run["answered"] == run["sent"] > 0
    assert run["events"] == (4 * run["answered"] if stream else 0)  # three tokens and [DONE]
    assert engines.counts()["requests"] == run["sent"] + 1
    assert engines.counts()["events"] == (3 * (run["sent"] + 1) if stream else 0)


@needs_gcc
@pytest.mark.parametrize("stream", [False, True])
def test_one_wrong_byte_makes_an_answer_wrong(engines: HttpEngines, tmp_path: Path, stream: bool) -> None:
    engines.pace(Pace(events=3, first_us=500, interval_us=500))
    answer = post(f"{engines.urls[0]}/v1/chat/completions", prompts.one(1024, stream=stream)[0])
    run = load(engines, tmp_path, answer[:-1] + b"?", stream=stream, conns=1)["run"]
    assert run["answered"] == 0
    assert run["wrong_body"] == run["sent"] > 0
