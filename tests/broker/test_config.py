from pathlib import Path

import msgspec
import pytest

from broker import config
from broker.errors import ConfigError

FASTDEPLOY_EXAMPLE = """
server:
  port: "8080"
  host: "0.0.0.0"
  mode: "debug"
  splitwise: true
scheduler:
  policy: "power_of_two"
  prefill-policy: "cache_aware"
  decode-policy: "request_num"
  eviction-interval-secs: 60
  eviction-duration-mins: 30
  balance-abs-threshold: 1
  balance-rel-threshold: 0.2
  hit-ratio-weight: 1.0
  load-balance-weight: 0.05
  cache-block-size: 4
  # tokenizer-url: "http://0.0.0.0:8098"
  # tokenizer-timeout-secs: 2
  waiting-weight: 10
  stats-interval-secs: 5
manager:
  health-failure-threshold: 3
  health-success-threshold: 2
  health-check-timeout-secs: 5
  health-check-interval-secs: 5
  health-check-endpoint: /health
  register-path: "config/register.yaml"
log:
  level: "info"
  output: "file"
"""


def load(
    tmp_path: Path,
    text: str,
    env: dict[str, str] | None = None,
    flags: dict[tuple[str, str], object] | None = None,
) -> config.Config:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return config.load(file, env or {}, flags or {})


def test_fastdeploys_example_loads_unchanged(tmp_path: Path) -> None:
    loaded = load(tmp_path, FASTDEPLOY_EXAMPLE)
    assert loaded.server.port == 8080
    assert loaded.server.splitwise
    assert loaded.scheduler.prefill_policy == "cache_aware"
    assert loaded.scheduler.waiting_weight == 10
    assert loaded.manager.register_path == "config/register.yaml"
    assert loaded.log.output == "file"


def test_later_sources_win(tmp_path: Path) -> None:
    text = "server: {port: 1000, workers: 3, host: 127.0.0.1}"
    env = {"PENSTOCK_SERVER_PORT": "2000", "PENSTOCK_SERVER_WORKERS": "4"}
    env["PENSTOCK_MANAGER_METRICS_INTERVAL_SECS"] = "0.5"
    loaded = load(tmp_path, text, env, {("server", "port"): 3000, ("server", "host"): None})
    assert (loaded.server.port, loaded.server.workers, loaded.server.host) == (3000, 4, "127.0.0.1")
    assert loaded.manager.metrics_interval_secs == 0.5


def test_children_read_what_the_supervisor_wrote(tmp_path: Path) -> None:
    loaded = load(tmp_path, FASTDEPLOY_EXAMPLE)
    assert config.parse(config.dump(loaded)) == loaded


def test_zero_can_be_configured(tmp_path: Path) -> None:
    loaded = load(tmp_path, "scheduler: {waiting-weight: 0, balance-rel-threshold: 0}")
    assert loaded.scheduler.waiting_weight == 0
    assert loaded.scheduler.balance_rel_threshold == 0


@pytest.mark.parametrize("text", ["", "server:\n", "server: {}\nlog:\n", "server: {port: null}"])
def test_what_is_left_empty_takes_its_default(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == config.Config()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sever: {port: 1}", "unknown section 'sever'; did you mean 'server'?"),
        ("server: {prot: 1}", "unknown key 'server.prot'; did you mean 'port'?"),
        ("scheduler: {waiting_weight: 1}", "unknown key 'scheduler.waiting_weight'; did you mean 'waiting-weight'?"),
        ("log: {zzzzzz: 1}", "known: "),
        ("server: {port: 0}", "$.server.port"),
        ("server: {port: 65536}", "$.server.port"),
        ("server: {port: http}", "$.server.port"),
        ("server: {workers: 0}", "$.server.workers"),
        ("server: {splitwise: maybe}", "$.server.splitwise"),
        ("scheduler: {policy: best}", "$.scheduler.policy"),
        ("scheduler: {waiting-weight: -1}", "$.scheduler.waiting-weight"),
        ("manager: {health-check-interval-secs: 0}", "$.manager.health-check-interval-secs"),
        ("log: {level: loud}", "$.log.level"),
        ("models: {aliases: [a]}", "$.models.aliases"),
        ("- a", "must be a mapping"),
        ("server: 1", "must be a mapping"),
        ("server: {backlog: 10000000000}", "$.server.backlog"),
        ("shm: {slots: 65536}", "$.shm.slots"),
        ("timeouts: {idle-secs: .inf}", "$.timeouts.idle-secs"),
        ("server: {max-body-bytes: 2000000000}", "max-receiving-bytes must not be less than max-body-bytes"),
        ("engines: {control-bind: 30100}", "$.engines.control-bind"),
        (
            "engines: {control-bind: '0.0.0.0:30100'}",
            "control-bind must be tcp://host:port or ipc://path, not '0.0.0.0",
        ),
        ("engines: {load-bind: 'tcp://*:0'}", "load-bind must be tcp://host:port"),
        ("engines: {p2p-nccl-bind: 'http://a:1'}", "p2p-nccl-bind must be tcp://host:port"),
        ("manager: {health-check-endpoint: health}", "health-check-endpoint must be a path like /health, not 'health'"),
        ("scheduler: {tokenizer-url: 'ftp://a:1'}", "tokenizer-url has an unknown scheme: 'ftp://a'"),
        ("a: [", "not valid YAML"),
        ("server: {port: 2024-13-45}", "not valid YAML"),
        pytest.param("a: " + "[" * 3000 + "]" * 3000, "not valid YAML", id="deep"),
    ],
)
def test_a_wrong_setting_stops_with_a_sentence_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert said in error.value.message
    assert "config.yaml" in error.value.message


@pytest.mark.parametrize("text", ["[", "2024-13-45"])
def test_an_environment_variable_that_is_no_yaml_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="PENSTOCK_SERVER_HOST is not valid YAML"):
        config.load(None, {"PENSTOCK_SERVER_HOST": text}, {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        config.load(tmp_path / "nowhere.yaml", {}, {})


def test_every_key_has_a_default_and_the_file_form_of_its_name() -> None:
    keys = [key for section in msgspec.structs.fields(config.Config) for key in msgspec.structs.fields(section.type)]
    assert all("_" not in key.encode_name for key in keys)
    assert msgspec.convert({}, config.Config) == config.Config()
