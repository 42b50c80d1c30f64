"""What a config.yaml of FastDeploy's router comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from broker import config
from broker.config import Config
from broker.errors import ConfigError, ConfigMalformed
from broker.faces import fd_settings

EXAMPLE = Path(__file__).parents[1] / "fixtures" / "fastdeploy" / "config.yaml"


def settled(tree: dict[str, Any]) -> tuple[Config, list[str]]:
    kept, doubts = fd_settings.read(tree)
    return config.build(kept), doubts


def test_the_originals_defaults() -> None:
    found, doubts = settled({})
    scheduler, manager = found.scheduler, found.manager
    assert doubts == []
    assert (scheduler.policy, scheduler.prefill_policy, scheduler.decode_policy) == (
        "request_num",
        "process_tokens",
        "request_num",
    )
    assert (scheduler.eviction_interval_secs, scheduler.eviction_duration_mins) == (60, 30)
    assert (scheduler.cache_block_size, scheduler.tokenizer_url, scheduler.tokenizer_timeout_secs) == (64, "", 2)
    assert (scheduler.balance_abs_threshold, scheduler.balance_rel_threshold) == (1, 0.2)
    assert (scheduler.hit_ratio_weight, scheduler.load_balance_weight, scheduler.waiting_weight) == (1, 1, 1)
    assert scheduler.stats_interval_secs == 5
    assert (manager.health_failure_threshold, manager.health_success_threshold) == (1, 1)
    assert (manager.health_check_timeout_secs, manager.health_check_interval_secs) == (5, 5)
    assert (manager.health_check_endpoint, manager.register_path) == ("/health", "")
    assert (found.log.level, found.log.output) == ("info", "stdout")
    assert (found.log.max_age_days, found.log.max_total_size_mb, found.log.cleanup_interval_secs) == (7, 500, 3600)
    assert (found.server.workers, found.server.splitwise) == (1, False)


def test_the_originals_example_is_read_as_it_stands() -> None:
    found, doubts = settled(yaml.safe_load(EXAMPLE.read_text()))
    assert doubts == []
    assert (found.manager.health_failure_threshold, found.manager.health_success_threshold) == (3, 2)
    assert (found.scheduler.waiting_weight, found.scheduler.load_balance_weight) == (10, 0.05)


@pytest.mark.parametrize(
    ("section", "key", "written", "meant"),
    [
        ("server", "port", "30000", 30000),
        ("server", "port", 30000, 30000),
        ("manager", "health_failure_threshold", 3.0, 3),
        ("manager", "health_check_interval_secs", 1, 1.0),
        ("scheduler", "waiting_weight", 0, 0.0),
        ("scheduler", "balance_abs_threshold", 0, 0.0),
        ("scheduler", "hit_ratio_weight", 0.0, 0.0),
        ("scheduler", "policy", "", "request_num"),
        ("scheduler", "policy", None, "request_num"),
        ("manager", "health_check_endpoint", "", "/health"),
        ("manager", "health_check_endpoint", "?probe=1", "?probe=1"),
        ("scheduler", "tokenizer_url", "10.0.0.1:8098", "10.0.0.1:8098"),
        ("log", "output", "somewhere", "stdout"),
        ("log", "output", "file", "file"),
        ("log", "level", "warn", "warn"),
    ],
)
def test_a_value_is_what_the_original_makes_of_it(section: str, key: str, written: object, meant: object) -> None:
    found, doubts = settled({section: {key.replace("_", "-"): written}})
    assert getattr(getattr(found, section), key) == meant
    assert doubts == []


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"server": {"colour": "red"}}, "config: unknown key 'server.colour' is ignored"),
        ({"plumbing": {"pipes": 3}}, "config: unknown key 'plumbing.pipes' is ignored"),
        ({"plumbing": 3}, "config: unknown section 'plumbing' is ignored"),
        (
            {"manager": {"health-failure-threshold": 0}},
            "config: 'manager.health-failure-threshold' cannot be 0; its default is used",
        ),
        (
            {"scheduler": {"cache-block-size": 0}},
            "config: 'scheduler.cache-block-size' cannot be 0; its default is used",
        ),
        (
            {"scheduler": {"tokenizer-url": "http://a:b"}},
            "config: 'scheduler.tokenizer-url' must be a URL, not 'http://a:b': Port could not be cast to integer "
            "value as 'b'; prompts are cut into characters",
        ),
        ({"log": {"level": "loud"}}, "config: 'log.level' is one of debug, info, warn, error; its default is used"),
    ],
)
def test_what_is_passed_over_is_said(tree: dict[str, Any], said: str) -> None:
    found, doubts = settled(tree)
    assert doubts == [said]
    assert found == settled({})[0]


@pytest.mark.parametrize("tree", [{"server": {"host": 5, "name": [], "mode": "noisy"}}, {"server": None}, {}])
def test_what_the_original_does_not_look_at_is_not_looked_at(tree: dict[str, Any]) -> None:
    assert settled(tree) == (settled({})[0], [])


@pytest.mark.parametrize("tree", [{"server": []}, {"scheduler": "x"}, {"log": 1}])
def test_a_section_that_is_none_stops_the_start(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigMalformed, match="must be a mapping"):
        fd_settings.read(tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"scheduler": {"policy": "bogus"}},
        {"manager": {"health-failure-threshold": "3"}},
        {"manager": {"health-failure-threshold": 2.5}},
        {"manager": {"health-check-interval-secs": -1}},
        {"manager": {"health-check-endpoint": "health"}},
        {"server": {"splitwise": "perhaps"}},
    ],
)
def test_a_value_of_a_wrong_type_stops_the_start(tree: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        settled(tree)
