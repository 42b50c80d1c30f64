"""Section 1: flags, exit codes, files, defaults."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from tests.blackbox.engine import Engine
from tests.blackbox.router import Router, run
from tests.support.processes import free_port
from tests.support.waiting import until

FIXTURES = Path(__file__).parents[1] / "fixtures" / "fastdeploy"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 1, r".*Failed to load config: failed to set router listen port"),
        (["-splitwise"], 1, r".*Failed to load config: failed to set router listen port"),
        (
            ["--config_path", "nowhere.yaml"],
            1,
            r".*Failed to load config: failed to read config file: .*nowhere.yaml.*",
        ),
        (["-config_path=bad.yaml"], 1, r".*Failed to load config: failed to parse config: .*"),
        (["--config_path=policy.yaml"], 1, r".*Failed to load config: .*bogus.*request_num.*"),
        (["-port", "99999"], 1, r".*Failed to start server: listen tcp: address 99999: invalid port"),
        (["-nope"], 2, r"flag provided but not defined: -nope"),
        (["--port"], 2, r"flag needs an argument: -port"),
        (["--splitwise=perhaps"], 2, r'invalid boolean value "perhaps" for -splitwise: parse error'),
        (["---port"], 2, r"bad flag syntax: ---port"),
        (["-h"], 0, r"Usage of .*"),
        (["--help"], 0, r"Usage of .*"),
    ],
)
def test_the_first_line_and_the_exit_code(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    (tmp_path / "bad.yaml").write_text("server: [")
    (tmp_path / "policy.yaml").write_text("server: {port: 1}\nscheduler: {policy: bogus}")
    ended = run(*arguments, cwd=tmp_path)
    assert ended.returncode == code
    assert re.fullmatch(said, ended.stderr.splitlines()[0]), ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("flag", ["-V", "--V", "-version", "--version=true"])
def test_the_version_has_six_lines(flag: str) -> None:
    shown = run(flag)
    assert shown.returncode == 0
    first, *rest = shown.stdout.splitlines()
    assert first == "golang-router"
    assert [line.strip().split(":")[0] for line in rest] == ["version", "commit", "dirty", "vcsTime", "module"]


def test_a_port_in_use_ends_the_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("0.0.0.0", free_port()))
        taken.listen()
        ended = run("-port", str(taken.getsockname()[1]), cwd=tmp_path)
    assert ended.returncode == 1
    assert re.search(r"Failed to start server: .*in use", ended.stderr)


def test_fastdeploys_example_files_start_unchanged(tmp_path: Path) -> None:
    """config.yaml names the port, splitwise, a register.yaml of engines that are not there, and a log file."""
    port = free_port()
    text = (FIXTURES / "config.yaml").read_text()
    assert '"8080"' in text
    files = {"config/register.yaml": (FIXTURES / "register.yaml").read_text()}
    # Another port than the example's: others run on this machine, too.
    with Router(tmp_path, f"--port={port}", config=text, port=port, files=files) as router:
        assert router.numbers() == {"decode": 0, "mixed": 0, "prefill": 0}
        said = r"\[ERROR\] \S+ \S+ logger.go:\d+: Failed to register instance from index {}: "
        log = tmp_path / "logs" / "router.log"
        lines = [said.format(index) + r"http://127\.0\.0\.1:809\d service is not healthy" for index in (0, 1)]
        for line in (*lines, rf"\[INFO\] .*: Starting server on :{port}\n"):
            until(lambda line=line: re.search(line, log.read_text()), log.read_text)
        assert router.out == ""
        refused = router.post("/register", {"role": "mixed", "host_ip": "127.0.0.1", "port": 1})
        assert refused.json()["msg"] == "splitwise mode only supports PREFILL/DECODE instances"


def test_register_yaml_is_tried_again_and_unknown_keys_are_warned_about(tmp_path: Path) -> None:
    """Lists may be comma strings there; bad entries are said by their index, and do not stop the others."""
    port = free_port()
    listed = f"""
instances:
  - {{role: prefill, host_ip: 127.0.0.1, port: {port}, transfer_protocol: "ipc, rdma", rdma_ports: "7100,7101"}}
  - {{role: both, host_ip: 127.0.0.1, port: 1}}
"""
    config = f"""
server: {{port: "{(own := free_port())}", host: 10.255.255.1, name: x, mode: debug, splitwise: true, colour: red}}
scheduler: {{waiting-weight: 0, balance-abs-threshold: 0, tokenizer-url: ""}}
manager: {{register-path: register.yaml, health-check-interval-secs: 0.2, health-failure-threshold: 0}}
log: {{output: somewhere, level: info}}
plumbing: {{pipes: 3}}
"""
    with Router(tmp_path, config=config, port=own, files={"register.yaml": listed}) as router:
        for key in ("server.colour", "plumbing.pipes"):
            router.await_line(rf"\[WARN\] .*: config: unknown key '{key}' is ignored", "out")
        router.await_line(r"\[ERROR\] .*: Failed to register instance from index 1: .*invalid role: both", "err")
        router.await_line(r"\[ERROR\] .*: Failed to register instance from index 0: .* service is not healthy", "err")
        router.engines.append(Engine("prefill", {}, port=port))
        router.await_line(r"\[INFO\] .*: Successfully registered instance from index 0", "out")
        (entry,) = router.registered()["prefill"]
        assert (entry["transfer_protocol"], entry["rdma_ports"]) == (["ipc", "rdma"], ["7100", "7101"])
