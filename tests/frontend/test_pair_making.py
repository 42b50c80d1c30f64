"""Who makes a pair, and what its connector and the settings ask of the two."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.errors import ConnectFailed, UpstreamBroken, UpstreamTimeout
from broker.route import RouteRequest
from broker.table import State
from broker.types import Connector, EngineKind, FastDeployFields, PairFields, Role
from frontend.pair import Terms
from tests.frontend.fakes import FakeCall
from tests.frontend.pairs import ANSWER, PairFrontend, failed, held

# -- who makes a pair ------------------------------------------------------------------------------------------


def test_pairs_are_of_one_connector(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.VLLM, 1, 0) as it:
        it.admit("http://d0:80", Role.DECODE, engine=EngineKind.SGLANG)
        it.pair()
        assert "fits" in failed(it).message
        assert held(it) == (0, 0)
        it.admit("http://d1:80", Role.DECODE)
        for _ in range(8):
            it.pair(sink=type(it.client)())
            assert it.prefill.instance.url == "http://p0:80"
            it.prefill.answer(ANSWER)
            assert it.decode.instance.url == "http://d1:80"
        mooncake = PairFields(connector=Connector.MOONCAKE)
        it.admit("http://p1:80", Role.PREFILL, pair=mooncake)
        it.pair(sink=type(it.client)())
        assert it.prefill.instance.url == "http://p0:80"  # nobody would decode for the other one, idle as it is


def test_pairs_are_of_one_size_or_decode_has_one_device(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 0, 0) as it:
        it.admit("http://p0:80", Role.PREFILL, fastdeploy=FastDeployFields(tp_size=1))
        it.admit("http://d0:80", Role.DECODE, fastdeploy=FastDeployFields(tp_size=2))
        it.pair()
        assert "fits" in failed(it).message
        it.admit("http://p1:80", Role.PREFILL, fastdeploy=FastDeployFields(tp_size=2))
        it.pair(sink=type(it.client)())
        assert it.prefill.instance.url == "http://p1:80"


def test_pairs_have_a_model_in_common_also_when_none_is_asked_for(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 0, 0) as it:
        it.admit("http://p0:80", Role.PREFILL, models=("a",))
        it.admit("http://p1:80", Role.PREFILL, models=("b",))
        it.admit("http://d1:80", Role.DECODE, models=("b", "tiny"))
        for _ in range(4):
            choice = it.forwarder.dispatcher.choose(RouteRequest(), (), 0.0)
            assert choice.where == "http://p1:80,http://d1:80"


def test_without_a_decode_nothing_is_held(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 1, 1) as it:
        it.run.writer.set_state(it.slots["http://d0:80"], State.DOWN)
        it.pair()
        assert failed(it).status == 503
        assert held(it) == (0, 0)


def test_a_single_pair_is_tried_again(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 1, 1) as it:
        it.pair()
        calls: list[FakeCall] = it.http.calls
        calls[0].sink.fail(ConnectFailed("refused"))
        assert len(calls) == 4
        calls[2].answer(b"")
        calls[3].answer(b"text")
        assert it.client.heard == [200, b"text", "end"]


# -- terms -----------------------------------------------------------------------------------------------------


def test_decodes_answer_may_have_to_wait_for_prefills_status(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 2, 2, Terms(awaits_prefill_s=2.0)) as it:
        it.pair()
        it.decode.sink.start(200, [])
        assert it.decode.paused
        dead = it.prefill
        dead.sink.fail(UpstreamBroken("gone"))
        assert it.decode.instance != dead.instance
        it.decode.sink.start(200, [])
        it.time.advance(1.9)
        assert it.decode.paused
        it.prefill.sink.start(200, [])
        it.decode.sink.write(b"text")
        it.decode.sink.finish()
        assert it.client.heard == [200, b"text", "end"]


def test_a_prefill_that_never_says_anything_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 2, 2, Terms(awaits_prefill_s=2.0)) as it:
        it.pair()
        it.time.advance(1.5)
        it.decode.sink.start(200, [])
        it.time.advance(0.6)
        assert not it.decode.paused
        it.decode.sink.write(b"text")
        assert it.client.heard == [200, b"text"]


def test_a_single_pair_may_be_asked_once_only(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 1, 2, Terms(repeats=False)) as it:
        it.pair()
        it.decode.sink.fail(ConnectFailed("refused"))  # there is another decode
        it.prefill.sink.fail(ConnectFailed("refused"))
        assert isinstance(failed(it), ConnectFailed)
        assert (len(it.legs("p")), len(it.legs("d"))) == (2, 2)
        assert held(it) == (0, 0)


@pytest.mark.parametrize(
    ("terms", "until", "blamed"),
    [
        (Terms(prefill_s=5.0), "sent", "http://p0:80"),
        (Terms(decode_s=5.0), "prefilled", "http://d0:80"),
        (Terms(whole_s=5.0), "answering", "http://d0:80"),
    ],
)
def test_each_stage_has_a_limit(tmp_path: Path, terms: Terms, until: str, blamed: str) -> None:
    with PairFrontend(tmp_path, EngineKind.FASTDEPLOY, 1, 1, terms) as it:
        it.pair()
        if until != "sent":
            it.prefill.sink.start(200, [])
            it.prefill.sink.write(b"x")
        if until == "answering":
            it.decode.sink.start(200, [])
            it.decode.sink.write(b"x")
        it.time.advance(4.9)
        assert it.forwarder.live
        it.time.advance(0.2)
        assert isinstance(it.client.heard[-1], UpstreamTimeout)
        assert {url for url, slot in it.slots.items() if it.breaker.failures(slot)} == {blamed}
        assert held(it) == (0, 0)
        assert it.time.pending == 0


def test_a_stage_that_ends_in_time_is_not_limited_any_more(tmp_path: Path) -> None:
    with PairFrontend(tmp_path, EngineKind.VLLM, 1, 1, Terms(prefill_s=5.0, decode_s=5.0)) as it:
        it.pair()
        it.time.advance(4.0)
        it.prefill.answer(ANSWER)
        it.time.advance(4.0)
        it.decode.sink.start(200, [])
        it.decode.sink.write(b"x")
        it.time.advance(60.0)
        it.decode.sink.finish()
        assert it.client.heard == [200, b"x", "end"]
