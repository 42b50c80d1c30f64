"""`penstock serve` as a user meets it: the real supervisor, real processes, real sockets."""

from __future__ import annotations

import asyncio
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from tests.support import shmdir
from tests.support.client import Client, chat
from tests.support.processes import Fleet, free_port
from tests.support.waiting import PATIENCE_S, eventually, until


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("serve"), workers=2, sim=3) as running:
        running.await_instances(3)
        yield running


def penstock(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "broker.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_the_curl_of_the_banner_works(fleet: Fleet, tmp_path: Path) -> None:
    banner = fleet.supervisor.output
    command = re.search(r"curl .*\\\n.*}'", banner)
    assert command is not None, banner
    answer = subprocess.run(["bash", "-c", command.group() + " -sS"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("data: {")
    assert answer.stdout.endswith("data: [DONE]\n\n")


def test_the_banner_says_that_the_engines_are_simulated(fleet: Fleet) -> None:
    assert "3 simulated ones" in fleet.supervisor.output
    assert "policy         prefix_cost" in fleet.supervisor.output


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client_works_unchanged(fleet: Fleet, stream: bool) -> None:
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        question = [{"role": "user", "content": "Hello"}]
        for name in (model, "any-other"):
            if stream:
                chunks = list(client.chat.completions.create(model=name, messages=question, max_tokens=6, stream=True))
                words = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            else:
                answer = client.chat.completions.create(model=name, messages=question, max_tokens=6)
                words = answer.choices[0].message.content or ""
            assert len(words.split()) == 6
        completion = client.completions.create(model=model, prompt="Hello", max_tokens=3)
        assert len(completion.choices[0].text.split()) == 3
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model=7, messages=question)


def test_the_commands_speak_to_a_running_server(fleet: Fleet) -> None:
    listed = penstock("instances", "--port", str(fleet.port))
    assert listed.returncode == 0
    assert len(listed.stdout.splitlines()) == 4
    url = fleet.instances()[0]["url"]
    assert penstock("drain", url, "--port", str(fleet.port)).stdout == f"{url} is draining\n"
    until(lambda: [i["state"] for i in fleet.instances() if i["url"] == url] == ["draining"], "draining")
    assert penstock("drain", url, "--resume", "--port", str(fleet.port)).returncode == 0
    fleet.await_instances(3)
    unknown = penstock("drain", "http://127.0.0.1:1", "--port", str(fleet.port))
    assert unknown.returncode == 1
    assert unknown.stderr.endswith("answered 404: http://127.0.0.1:1 is not registered\n")


def test_the_shared_memory_can_be_looked_at(fleet: Fleet) -> None:
    command = [sys.executable, "-m", "shm", str(fleet.run_dir)]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout
    assert "load" in dumped
    assert "counters" in dumped


def test_a_second_start_on_the_same_port_fails_and_harms_nothing(fleet: Fleet) -> None:
    again = penstock("serve", "--host", "127.0.0.1", "--port", str(fleet.port), "--shm-dir", str(fleet.shm_dir))
    assert again.returncode == 1
    assert f"127.0.0.1:{fleet.port}" in again.stderr
    assert fleet.get("/health")[0] == 200
    assert fleet.run_dir.exists()


def test_sighup_swaps_every_frontend_under_load(fleet: Fleet) -> None:
    before = {name: p.pid for name, p in fleet.processes().items() if name.startswith("frontend")}
    fleet.supervisor.signal(signal.SIGHUP)

    def swapped() -> bool:
        status, _ = fleet.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2})
        assert status == 200
        now = {name: p.pid for name, p in fleet.processes().items() if name.startswith("frontend")}
        return len(now) == 2 and not set(now.values()) & set(before.values())

    until(swapped, lambda: f"two new frontends: {fleet.processes()}")
    fleet.await_idle()


def test_a_swap_lets_streams_take_longer_than_a_stop_would(tmp_path: Path) -> None:
    async def run(fleet: Fleet) -> None:
        with Client(fleet.port) as client:
            sent = [await client.send("/v1/chat/completions", chat(f"{n}", max_tokens=60)) for n in range(4)]
            for exchange in sent:
                await asyncio.wait_for(exchange.first_byte, PATIENCE_S)
            before = fleet.process("frontend-0").pid
            fleet.supervisor.signal(signal.SIGHUP)
            await eventually(lambda: "frontend-1" in fleet.processes(), "the new frontend")
            for exchange in sent:
                await asyncio.wait_for(exchange.ended, PATIENCE_S)
                assert exchange.whole, exchange
            await eventually(lambda: before not in [p.pid for p in fleet.processes().values()], "the old one's end")

    # 60 words at 100 ms: three times as long as a stop would wait, and the new frontend is there within a part of it.
    with Fleet(tmp_path, workers=1, config={"server": {"drain-secs": 2}}) as fleet:
        fleet.engine("a", "--decode-step-ms", "100")
        fleet.await_instances(1)
        asyncio.run(run(fleet))


def test_sighups_that_come_during_a_swap_are_one_more_swap(tmp_path: Path) -> None:
    with Fleet(tmp_path, workers=2, sim=1) as fleet:
        fleet.await_instances(1)

        def frontends() -> set[int]:
            return {p.pid for name, p in fleet.processes().items() if name.startswith("frontend")}

        seen = frontends()
        # Each while the one before it is at work: the first new frontend has not said yet that it is ready.
        for _ in range(4):
            fleet.supervisor.signal(signal.SIGHUP)
            before = len(seen)

            def another(before: int = before) -> bool:
                seen.update(frontends())
                return len(seen) > before

            until(another, lambda: f"a new frontend: {fleet.supervisor.output}")
        until(lambda: len(frontends()) == 2 and len(seen | frontends()) >= 6, lambda: fleet.supervisor.output)
        assert fleet.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2})[0] == 200


def test_the_usual_limit_of_open_files_is_none_for_the_server(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = before[1]
    # Of this process, too, while it starts the other; it may have more open already, so not the usual 1,024 or less.
    few = max(1024, 2 * len(list(Path("/proc/self/fd").iterdir())))
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
    try:
        with Fleet(tmp_path, workers=1) as fleet:
            limits = {name: process.rlimit(psutil.RLIMIT_NOFILE) for name, process in fleet.processes().items()}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert few < most
    assert limits == {"scheduler": (most, most), "frontend-0": (most, most)}


def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with Fleet(tmp_path, workers=2, sim=2) as fleet:
        fleet.await_instances(2)
        fleet.supervisor.popen.kill()
        fleet.supervisor.popen.wait()
        until(lambda: not fleet.left(), lambda: f"the children to end: {fleet.left()}")
        stale = fleet.run_dir
        # The next start removes what was left behind.
        fleet.supervisor = fleet.program("supervisor-2", ["-m", "broker.cli", "serve", *fleet._flags])
        until(lambda: "listening on" in fleet.supervisor.output, lambda: fleet.supervisor.output)
        assert not stale.exists()


def test_three_run_side_by_side_with_nothing_but_the_port_different(tmp_path: Path) -> None:
    one, two, three = (Fleet(tmp_path / str(number), workers=1, sim=1) for number in range(3))
    shared = shmdir.fresh()
    for fleet in (one, two, three):
        fleet.root.mkdir()
        # All in one shared-memory directory, as three starts without a flag would be.
        fleet._flags[fleet._flags.index(str(fleet.shm_dir))] = str(shared)
    shared.mkdir()
    with one, two, three:
        for fleet in (one, two, three):
            fleet.await_instances(1)
            assert fleet.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2})[0] == 200
        names = sorted(path.name.split("-")[1] for path in shared.iterdir())
        assert names == sorted(str(fleet.port) for fleet in (one, two, three))
        two.supervisor.signal(signal.SIGTERM)
        assert two.supervisor.await_exit() == 0
        for fleet in (one, three):
            assert fleet.post("/v1/completions", {"prompt": "Hello", "max_tokens": 2})[0] == 200
    shared.rmdir()  # which is possible because it is empty


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--config_path", "nowhere.yaml"], "nowhere.yaml"),
        (["serve", "--port", "0"], "--port"),
        (["serve", "--sim", "some"], "auto"),
        (["serve", "--shm-dir", "/nowhere/at/all"], "shm.dir"),
        (["serve", "--host", "256.1.1.1"], "256.1.1.1"),
        (["serve", "--workers", "65"], "shm.frontends"),
        (["serve", "--nonsense"], "--nonsense"),
        (["instances", "--port", "1"], "no Penstock"),
        (["check", "--config_path", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(arguments: list[str], said: str) -> None:
    refused = penstock(
        *arguments, *(["--port", str(free_port())] if arguments[0] == "serve" and "--port" not in arguments else [])
    )
    assert refused.returncode in (1, 2)
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


def test_check_prints_the_settings_in_force() -> None:
    checked = penstock("check", "--port", "4321")
    assert checked.returncode == 0
    assert '"port": 4321' in checked.stdout


def test_version_and_help() -> None:
    assert re.fullmatch(r"penstock, version \d+\.\d+\.\d+\n", penstock("--version").stdout)
    for command in ("serve", "sim", "check", "instances", "drain"):
        shown = penstock(command, "--help")
        assert shown.returncode == 0, shown.stderr
        assert "sage:" in shown.stdout
