"""How an instance is chosen: one file per policy, one dict of names."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

from broker.config import Config, PolicyName, Scheduler
from broker.errors import ConfigError
from broker.policies.base import Loads, Options, Picker
from broker.policies.cache_aware import CacheAware
from broker.policies.fd_metrics_score import FdMetricsScore
from broker.policies.fd_remote_metrics_score import FdRemoteMetricsScore
from broker.policies.policy import Policy
from broker.policies.power_of_two import PowerOfTwo
from broker.policies.prefix_cost import PrefixCost
from broker.policies.process_tokens import ProcessTokens
from broker.policies.random import RandomChoice
from broker.policies.remote_cache_aware import RemoteCacheAware
from broker.policies.request_num import RequestNum
from broker.policies.round_robin import RoundRobin
from broker.policies.whole_prompts import WholePrompts
from broker.prefix import PrefixIndex
from broker.types import Role

__all__ = [
    "INDEXED",
    "POLICIES",
    "TOKENIZED",
    "Loads",
    "Options",
    "Picker",
    "Policy",
    "WholePrompts",
    "frontend_rng",
    "in_use",
    "make_policy",
    "need_index",
    "read_reports",
]

POLICIES: dict[str, Callable[[Options, Random, float], Picker]] = {
    "random": lambda _options, rng, _offset: RandomChoice(rng),
    "round_robin": lambda _options, _rng, offset: RoundRobin(offset),
    "power_of_two": lambda _options, rng, _offset: PowerOfTwo(rng),
    "process_tokens": lambda _options, rng, _offset: ProcessTokens(rng),
    "request_num": lambda _options, rng, _offset: RequestNum(rng),
    "fd_metrics_score": lambda options, rng, _offset: FdMetricsScore(options, rng),
    "fd_remote_metrics_score": lambda options, rng, _offset: FdRemoteMetricsScore(options, rng),
}
"""FastDeploy's names that decide by load alone. Each role has a policy of its own: none shares a turn with another."""

Clock = Callable[[], float]

INDEXED: dict[str, Callable[[Options, Random, PrefixIndex, Clock], Policy]] = {
    "cache_aware": lambda options, rng, index, _clock: CacheAware(options, rng, index),
    "remote_cache_aware": lambda options, rng, index, _clock: RemoteCacheAware(options, rng, index),
    "prefix_cost": lambda _options, rng, index, clock: PrefixCost(rng, index, clock),
}
"""Those that look prompts up in the prefix index. One index serves all roles of a frontend."""

TOKENIZED = frozenset(("cache_aware", "remote_cache_aware"))
"""Those that cut prompts by the tokenizer's tokens, if there is one; FastDeploy's."""

READ_REPORTS = frozenset(("fd_remote_metrics_score", "remote_cache_aware"))
"""Those that decide by what engines report; the others need no report for their decisions."""


def read_reports(settings: Scheduler) -> bool:
    """Whether any policy in force reads reports."""
    return not READ_REPORTS.isdisjoint((settings.policy, settings.prefill_policy, settings.decode_policy))


def in_use(config: Config) -> dict[Role, PolicyName]:
    """The policies of the roles that instances may have."""
    settings = config.scheduler
    if config.server.splitwise:
        return {Role.PREFILL: settings.prefill_policy, Role.DECODE: settings.decode_policy}
    return {Role.MIXED: settings.policy}


def need_index(config: Config) -> bool:
    """Whether any policy in use looks prompts up."""
    return not INDEXED.keys().isdisjoint(in_use(config).values())


def make_policy(
    name: str,
    options: Options,
    rng: Random,
    offset: float,
    index: PrefixIndex | None = None,
    clock: Clock = time.monotonic,
) -> Policy:
    """The policy of that name. `offset` is k/N for frontend k of N: where on the circle its round robin starts. `clock`
    counts seconds.

    Raises `ConfigError` with a sentence that lists the known names; `ValueError` for an `INDEXED` one without index.
    """
    if name in POLICIES:
        return WholePrompts(POLICIES[name](options, rng, offset))
    if name not in INDEXED:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join([*POLICIES, *INDEXED])}")
    if index is None:
        raise ValueError(f"{name} needs a prefix index")
    return INDEXED[name](options, rng, index, clock)


def frontend_rng(seed: int, frontend: int) -> Random:
    """The draws of one frontend: its own sequence, the same again for the same seed."""
    return Random(f"{seed}/{frontend}")
