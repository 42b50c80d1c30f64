"""What becomes of a registration with what the instance says when it is probed."""

from __future__ import annotations

from typing import Any

import pytest

from broker.scheduler.fields import parse
from broker.types import EngineKind, Instance

BASE: dict[str, Any] = {"role": "mixed", "host_ip": "10.0.0.1", "port": 8000}


def test_what_was_registered_has_precedence_over_what_was_found() -> None:
    registration = parse({**BASE, "models": ["mine"], "load_endpoint": "tcp://h:1"}, False)
    joined = registration.joined(EngineKind.SGLANG, ("theirs",), "tcp://h:2")
    assert (joined.models, joined.load_endpoint) == (("mine",), "tcp://h:1")


@pytest.mark.parametrize(
    ("kind", "load_endpoint", "polled"),
    [
        (EngineKind.VLLM, "", True),
        (EngineKind.FASTDEPLOY, "", True),
        (EngineKind.SGLANG, "", True),
        (EngineKind.SGLANG, "tcp://h:1", False),
        (EngineKind.OPENAI, "", False),
    ],
)
def test_only_who_tells_load_by_metrics_alone_is_polled(kind: EngineKind, load_endpoint: str, polled: bool) -> None:
    assert bool(parse(BASE, False).joined(kind, (), load_endpoint).metrics_url) is polled


def test_a_second_registration_keeps_what_probing_found() -> None:
    registration = parse(BASE, False)
    known = registration.joined(EngineKind.VLLM, ("found",))
    assert registration.rejoined(known) == known


@pytest.mark.parametrize("said", [{"models": "mine"}, {"engine": "sglang"}, {"load_endpoint": "tcp://h:1"}])
def test_what_only_an_earlier_registration_said_does_not_hold_any_more(said: dict[str, str]) -> None:
    bare, full = parse(BASE, False), parse({**BASE, **said}, False)
    known = full.joined(EngineKind.SGLANG, ("found",), "tcp://h:2")
    assert full.rejoined(known) == known
    assert bare.rejoined(known) is None  # what it leaves open has not been asked for
    found = bare.joined(EngineKind.SGLANG, ("found",), "tcp://h:2")
    assert full.rejoined(found) == known


def test_a_native_engines_own_word_has_precedence_over_what_others_register() -> None:
    known = Instance(url="tcp://10.0.0.1:8000", engine=EngineKind.NATIVE, incarnation=b"i" * 16)
    assert parse({**BASE, "engine": "native"}, False).rejoined(known) == known
