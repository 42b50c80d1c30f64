"""FastDeploy's flags, what a start checks, and that nobody else pays for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from broker import check, config
from broker.cli import cli
from broker.cluster import shares
from broker.errors import ConfigError
from tests.broker.cluster.redis_run import redis, shared_redis
from tests.support.processes import free_port
from tests.support.redis import RedisServer

__all__ = ["redis", "shared_redis"]

FLAGS = {
    "--scheduler-name": "global",
    "--scheduler-host": "10.0.0.9",
    "--scheduler-port": "7000",
    "--scheduler-db": "2",
    "--scheduler-password": "a secret",
    "--scheduler-topic": "prod",
    "--scheduler-ttl": "60",
    "--scheduler-min-load-score": "5",
    "--scheduler-load-shards-num": "4",
}


def settled(tmp_path: Path, *flags: str) -> tuple[config.Config, str]:
    """What `penstock check` prints."""
    ran = CliRunner().invoke(cli, ["check", "--shm-dir", str(tmp_path), *flags])
    return config.parse(ran.stdout.encode()), ran.output


def test_the_flags_of_fastdeploy_set_the_scheduler(tmp_path: Path) -> None:
    settings, shown = settled(tmp_path, *(part for flag in FLAGS.items() for part in flag))
    found = settings.scheduler
    assert (found.name, found.host, found.port, found.db, found.topic) == ("global", "10.0.0.9", 7000, 2, "prod")
    assert (found.queue_timeout_secs, found.min_load_score, found.load_shards_num) == (60, 5, 4)
    assert found.password == "***"
    assert "a secret" not in shown


@pytest.mark.parametrize(("flag", "value"), [("name", "gobal"), ("port", "0"), ("db", "-1"), ("ttl", "0")])
def test_a_flag_that_makes_no_sense_is_refused(tmp_path: Path, flag: str, value: str) -> None:
    ran = CliRunner().invoke(cli, ["check", f"--scheduler-{flag}", value])
    assert ran.exit_code == 2
    assert f"--scheduler-{flag}" in ran.output


@pytest.mark.parametrize("key", ["topic", "min-load-score", "load-shards-num", "unreachable"])
def test_a_key_that_makes_no_sense_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        config.build({"scheduler": {key: ""}})


def test_a_password_from_the_environment_is_taken_as_it_is() -> None:
    assert config.load(None, {"PENSTOCK_SCHEDULER_PASSWORD": "0123"}, {}).scheduler.password == "0123"


def fatal(tmp_path: Path, **keys: object) -> list[str]:
    scheduler = {"name": "global", **keys}
    return check.fatal(config.build({"scheduler": scheduler, "shm": {"dir": str(tmp_path)}}))


def test_a_start_asks_redis(tmp_path: Path, redis: RedisServer) -> None:
    assert fatal(tmp_path, port=redis.port) == []
    (said,) = fatal(tmp_path, port=redis.port, password="wrong")
    assert "scheduler.password is wrong or missing" in said
    (said,) = fatal(tmp_path, port=redis.port, db=99)
    assert "scheduler.db does not exist there" in said
    (said,) = fatal(tmp_path, port=free_port())
    assert "onnect" in said


def test_a_start_may_go_on_without_redis_and_check_says_so(tmp_path: Path) -> None:
    free = free_port()
    assert fatal(tmp_path, port=free, unreachable="local") == []
    tree = {"scheduler": {"name": "global", "port": free, "unreachable": "local"}}
    (said,) = check.doubtful(config.build(tree))
    assert f"Redis at 127.0.0.1:{free}" in said


@pytest.mark.parametrize("server", [{"splitwise": True}, {"compat": "fd-router"}])
def test_where_no_request_waits_nothing_is_shared_and_check_says_so(server: dict[str, object]) -> None:
    settings = config.build({"scheduler": {"name": "global"}, "server": server})
    assert not shares(settings)
    assert check.fatal(settings) == []
    (said,) = check.doubtful(settings)
    assert "has no effect" in said


def test_a_local_scheduler_loads_no_client_of_redis() -> None:
    program = (
        "import sys, broker.cli, broker.check, broker.scheduler.process, broker.supervisor, frontend.app\n"
        "broker.check.fatal(broker.check.Config()); sys.exit('redis' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
