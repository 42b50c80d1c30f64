"""What would go wrong at a start, found without starting anything: for `penstock check`, and before every start."""

from __future__ import annotations

import os
from pathlib import Path

from broker import policies
from broker.cluster import shares
from broker.config import Config
from broker.counters import counters_layout
from broker.prefix import run_layout
from broker.scheduler.registrar import read_entries
from broker.table import load_layout
from shm import fence


def fatal(settings: Config) -> list[str]:
    """A sentence for each reason why these settings cannot be started with here."""
    found = []
    workers, rows = settings.server.workers, settings.shm.frontends
    if workers > rows:
        found.append(f"server.workers is {workers}, but shm.frontends has room for {rows}")
    if workers > 1 and not fence.promised():
        found.append(fence.refusal())
    if settings.scheduler.unreachable == "exit":
        found += _cluster(settings)
    return found + _space(settings)


def doubtful(settings: Config) -> list[str]:
    """A sentence for each entry of register.yaml that a start would leave out, and for what it would do without."""
    path = settings.manager.register_path
    unusable = read_entries(Path(path), settings.server.splitwise)[1] if path else []
    found = [f"{entry.where}: {entry.problem}" for entry in unusable]
    if settings.scheduler.name == "global" and not shares(settings):
        found.append("scheduler.name: global has no effect: with splitwise, or as fd-router, no request waits for room")
    if settings.scheduler.unreachable == "local":
        found += _cluster(settings)
    return found


def _cluster(settings: Config) -> list[str]:
    if not shares(settings):
        return []
    from broker.cluster.probe import problem  # Redis' client: nothing else needs it

    found = problem(settings.scheduler)
    return [found] if found else []


def _space(settings: Config) -> list[str]:
    wanted = load_layout(settings.shm.slots).size + counters_layout(settings.shm.frontends, settings.shm.slots).size
    if policies.need_index(settings):
        wanted += run_layout(settings).size
    try:
        mount = os.statvfs(settings.shm.dir)
    except OSError as e:
        return [f"shm.dir: {settings.shm.dir}: {e.strerror}"]
    free = mount.f_bavail * mount.f_frsize
    if wanted <= free:
        return []
    return [
        f"shm.dir: {settings.shm.dir} has {free >> 20} MiB free, {wanted >> 20} MiB are needed "
        "(fewer shm.slots, shm.frontends or scheduler.prefix-blocks need less)"
    ]
