"""What is said to clients, in the words of both faces, of requests that did not come whole."""

from __future__ import annotations

import pytest

from broker.errors import BodyTooLarge, PenstockError, ReceivingFull
from broker.faces import FD_ROUTER, PENSTOCK
from frontend.errors import BodyTooSlow, HeadTooLarge, Malformed, whole


@pytest.mark.parametrize(
    ("kind", "status"),
    [(BodyTooLarge, 413), (ReceivingFull, 503), (BodyTooSlow, 408), (HeadTooLarge, 431), (Malformed, 400)],
)
def test_a_request_that_did_not_come_whole_is_no_wrong_json(kind: type[PenstockError], status: int) -> None:
    said, data, found = whole(kind("why"), FD_ROUTER)
    assert (said, data) == (status, b'{"error": "Invalid request body: why"}')
    assert (b"retry-after" in dict(found)) is (status == 503)
    assert whole(kind("why"), PENSTOCK)[0] == status
