"""The SDK registers: at a scheduler written from docs/wire.md alone."""

from __future__ import annotations

import logging

import pytest

from tests.broker.worker.serving import Served, echo
from tests.support import raw_native
from tests.support.raw_native import RawPenstock
from tests.support.waiting import until


def test_the_hello_holds_what_the_author_said(penstock: RawPenstock) -> None:
    transfer = bytes(range(256)) * 24
    with Served(penstock, echo, models=["a", "b"], role="decode", capacity=8, transfer=transfer, name="n") as served:
        tag, protocol, incarnation, endpoint, *rest = served.hello
        assert (tag, protocol) == (32, 1)
        assert len(incarnation) == 16
        assert incarnation[0] != 0
        assert endpoint == f"ipc://@penstock-{incarnation.hex()}"
        assert rest == [2, ["a", "b"], 8, transfer, "n"]


def test_beats_follow_and_goodbye_ends_them(penstock: RawPenstock) -> None:
    with Served(penstock, echo, capacity=3) as served:
        for _ in range(2):
            _, beat = penstock.hear(raw_native.ENGINE_BEAT)
            assert beat == [33, served.incarnation, 3, True]
        served.stop()
        _, goodbye = penstock.hear(raw_native.ENGINE_GOODBYE)
        assert goodbye == [34, served.incarnation]


@pytest.mark.parametrize("answer", [(raw_native.HELLO_AGAIN,), (raw_native.SCHEDULER_BEAT, 2)])
def test_hello_is_said_again_when_the_scheduler_is_another(penstock: RawPenstock, answer: tuple[int, ...]) -> None:
    with Served(penstock, echo) as served:
        peer, _ = penstock.hear(raw_native.ENGINE_BEAT)
        penstock.say(peer, *answer)
        assert penstock.accept(2) == served.hello


def test_hello_is_said_again_when_a_frontend_knows_a_newer_epoch(penstock: RawPenstock) -> None:
    with Served(penstock, echo) as served:
        penstock.hear(raw_native.ENGINE_BEAT)
        with served.frontend(epoch=2):
            assert penstock.accept(2) == served.hello


def test_garbage_from_the_scheduler_is_dropped(penstock: RawPenstock) -> None:
    with Served(penstock, echo):
        peer, _ = penstock.hear(raw_native.ENGINE_BEAT)
        for garbage in (b"", b"\xc1", b"\x93\x30", b"\x91\x7f"):
            penstock.control.send_multipart([peer, garbage])
        penstock.hear(raw_native.ENGINE_BEAT)


def test_an_engine_joins_the_next_run_when_its_own_is_gone() -> None:
    with RawPenstock() as first, Served(first, echo) as served:
        port = first.port
        first.__exit__()
        with RawPenstock(port) as second:
            assert second.run != first.run
            assert second.accept()[2] == served.incarnation


def test_an_engine_may_come_before_its_penstock(caplog: pytest.LogCaptureFixture) -> None:
    with RawPenstock() as gone:
        port = gone.port
    later = RawPenstock.__new__(RawPenstock)
    later.url = f"http://127.0.0.1:{port}"
    served = Served(later, echo)
    with caplog.at_level(logging.WARNING):
        served._thread.start()
        until(lambda: "no answer" in caplog.text, "the engine complains")
    with RawPenstock(port) as penstock:
        assert penstock.accept()[1] == 1
        served.__exit__()


def test_too_much_transfer_metadata_is_refused_at_once(penstock: RawPenstock) -> None:
    from broker.worker import serve

    with pytest.raises(ValueError, match="transfer metadata of 7169 bytes"):
        serve(echo, router=penstock.url, transfer=b"x" * 7169)
