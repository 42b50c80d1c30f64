"""What the supervisor decides between two events; how it does with real processes is in tests/e2e."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from broker import config
from broker.child import Child
from broker.supervisor import StartError, Supervisor, listening_socket, make_segments
from tests.support.processes import free_port


def child(name: str, row: int) -> Child:
    def command(_life: int, _ready_fd: int) -> Sequence[str]:
        raise AssertionError(f"{name} was started")

    return Child(name, command, row)


def test_a_frontend_that_is_dead_when_its_successor_is_ready_is_not_started_again() -> None:
    """Without it: (1) it waits for its next start, (2) it is swapped out, (3) it starts, and nobody ends it."""
    supervisor = Supervisor(config.Config())
    old, new = child("frontend-0", 0), child("frontend-2", 2)
    old.start_at, new.ready = 0.0, True
    supervisor._children[:] = [old, new]
    supervisor._swaps[:] = [(old, new)]
    supervisor._go_on_swapping()
    assert supervisor._children == [new]
    assert supervisor._swaps == []


def test_a_directory_that_cannot_hold_the_settings_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()  # as good as a mount that the segments have filled to the last page
    with pytest.raises(StartError, match=r"shm\.dir: cannot write .*config\.json"):
        make_segments(tmp_path, config.build({"shm": {"slots": 8, "frontends": 1}}))


def test_a_client_that_vanishes_without_a_word_is_noticed() -> None:
    """Without it, a request that is not streamed keeps its instance as long as the instance works for nobody."""
    with listening_socket(config.build({"server": {"host": "127.0.0.1", "port": free_port()}})) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            listener.setblocking(True)
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
