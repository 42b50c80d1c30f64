"""How an instance is chosen: one file per policy, one dict of names."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import get_args

from broker.config import PolicyName, Scheduler
from broker.errors import ConfigError
from broker.policies.base import Loads, Options, Policy
from broker.policies.cache_aware import CacheAware
from broker.policies.fd_metrics_score import FdMetricsScore
from broker.policies.fd_remote_metrics_score import FdRemoteMetricsScore
from broker.policies.power_of_two import PowerOfTwo
from broker.policies.prefix_cost import PrefixCost
from broker.policies.process_tokens import ProcessTokens
from broker.policies.random import RandomChoice
from broker.policies.remote_cache_aware import RemoteCacheAware
from broker.policies.request_num import RequestNum
from broker.policies.round_robin import RoundRobin
from broker.prefix import PrefixIndex

__all__ = ["INDEXED", "POLICIES", "Loads", "Options", "Policy", "check", "frontend_rng", "make_policy"]

POLICIES: dict[str, Callable[[Options, Random, float], Policy]] = {
    "random": lambda _options, rng, _offset: RandomChoice(rng),
    "round_robin": lambda _options, _rng, offset: RoundRobin(offset),
    "power_of_two": lambda _options, rng, _offset: PowerOfTwo(rng),
    "process_tokens": lambda _options, rng, _offset: ProcessTokens(rng),
    "request_num": lambda _options, rng, _offset: RequestNum(rng),
    "fd_metrics_score": lambda options, rng, _offset: FdMetricsScore(options, rng),
    "fd_remote_metrics_score": lambda options, rng, _offset: FdRemoteMetricsScore(options, rng),
}
"""FastDeploy's names that decide by load alone. Each role has a policy of its own: none shares a turn with another."""

INDEXED: dict[str, Callable[[Options, Random, PrefixIndex], Policy]] = {
    "cache_aware": CacheAware,
    "remote_cache_aware": RemoteCacheAware,
    "prefix_cost": lambda _options, rng, index: PrefixCost(rng, index),
}
"""Those that look prompts up in the prefix index. One index serves all roles of a frontend."""


READ_REPORTS = frozenset(("fd_remote_metrics_score", "remote_cache_aware", "prefix_cost"))
"""Those that decide by what engines report; the others need no report for their decisions."""


def read_reports(settings: Scheduler) -> bool:
    """Whether any policy in force reads reports."""
    return not READ_REPORTS.isdisjoint((settings.policy, settings.prefill_policy, settings.decode_policy))


def check(settings: Scheduler) -> None:
    """Whether the policies named in the settings can be made; for the start. Raises `ConfigError` as `make_policy`."""
    for name in (settings.policy, settings.prefill_policy, settings.decode_policy):
        make_policy(name, Options.of(settings), Random(settings.seed), 0.0)


def make_policy(name: str, options: Options, rng: Random, offset: float, index: PrefixIndex | None = None) -> Policy:
    """The policy of that name. `offset` is k/N for frontend k of N: where on the circle its round robin starts.

    Without `index` the policies that need one are not available.
    Raises `ConfigError` with a sentence that lists the known names.
    """
    if name in POLICIES:
        return POLICIES[name](options, rng, offset)
    if index is not None and name in INDEXED:
        return INDEXED[name](options, rng, index)
    known = ", ".join(POLICIES if index is None else [*POLICIES, *INDEXED])
    if name in get_args(PolicyName):
        raise ConfigError(f"the policy {name!r} is not available in this version; available: {known}")
    raise ConfigError(f"unknown policy {name!r}; known: {known}")


def frontend_rng(seed: int, frontend: int) -> Random:
    """The draws of one frontend: its own sequence, the same again for the same seed."""
    return Random(f"{seed}/{frontend}")
