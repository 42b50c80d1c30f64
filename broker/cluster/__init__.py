"""The global scheduler: hosts that lend each other room, over Redis. Only with `scheduler.name: global`, and only in
the scheduler's process; `member.py` is its shell, `docs/cluster.md` its description."""

from __future__ import annotations

from broker.config import Config
from broker.faces import face_of


def shares(config: Config) -> bool:
    """Whether a host takes part. Pairs, and the requests of a face without a queue, never wait for room."""
    return config.scheduler.name == "global" and face_of(config).queues and not config.server.splitwise
