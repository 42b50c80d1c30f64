"""The global scheduler: hosts that lend each other room, over Redis. Only with `scheduler.name: global`, and only in
the scheduler's process; `member.py` is its shell, `docs/cluster.md` its description."""
