"""What a person is told at the start can be pasted, whatever address was chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker import banner, config


@pytest.mark.parametrize(
    ("host", "listening", "reached", "command"),
    [
        ("0.0.0.0", "http://0.0.0.0:4321", "http://127.0.0.1:4321", "instances --port 4321"),
        ("127.0.0.1", "http://127.0.0.1:4321", "http://127.0.0.1:4321", "instances --port 4321"),
        ("::", "http://[::]:4321", "http://[::1]:4321", "instances --url http://[::1]:4321"),
        ("10.0.0.5", "http://10.0.0.5:4321", "http://10.0.0.5:4321", "instances --url http://10.0.0.5:4321"),
    ],
)
def test_the_addresses_of_the_banner_can_be_used(host: str, listening: str, reached: str, command: str) -> None:
    text = banner.text(config.build({"server": {"host": host, "port": 4321}}), Path("run"), 0)
    assert f"listening on   {listening}\n" in text
    assert f"curl {reached}/v1/" in text
    assert text.endswith(f"penstock {command}")
