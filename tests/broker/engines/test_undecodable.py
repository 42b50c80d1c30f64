"""Bytes of another program that no decoder can read: left out or refused, never an exception of a foreign kind."""

import pytest

from broker.engines.base import MODELS_PATH, Evidence
from broker.engines.sglang import load_endpoints
from broker.errors import BadRegistration
from broker.scheduler.fields import parse_body

BODIES = [b'{"data": [{"id": "\xff"}]}', b'{"kv_events": "\xff", "role": "\xff"}', b"[" * 5000, b"", b"\x00"]


@pytest.mark.parametrize("body", BODIES)
def test_undecodable_bodies_say_nothing_and_raise_nothing_foreign(body: bytes) -> None:
    assert Evidence({MODELS_PATH: body}).models() == ()
    assert load_endpoints(body, "127.0.0.1") == ""
    with pytest.raises(BadRegistration):
        parse_body(body, splitwise=False)
