"""Registration by P2pNcclConnector's beats: who they make a member, and when silence ends it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgpack
import pytest

from broker import config
from broker.errors import BadRegistration, Unhealthy, WireError
from broker.scheduler.p2p_nccl import SILENT_NS, P2pNcclBeats, registration
from broker.scheduler.registration import Registration
from broker.scheduler.registry import SECOND_NS, Registry
from broker.scheduler.tally import Tally
from broker.types import Connector, EngineKind, Role
from tests.broker.scheduler.fake_engine import FakeEngine, vllm
from tests.broker.scheduler.running import scheduler, settings
from tests.broker.scheduler.world import FakeTable
from tests.support.processes import free_port
from tests.support.waiting import until

SPLITWISE = config.build({"server": {"splitwise": True}})


def beat(**changes: object) -> bytes:
    fields = {"type": "P", "http_address": "10.0.0.1:8000", "zmq_address": "10.0.0.1:21001"}
    packed: bytes = msgpack.packb({**fields, **changes})
    return packed


def test_a_beat_says_role_and_both_addresses() -> None:
    for kind, role in (("P", Role.PREFILL), ("D", Role.DECODE)):
        found = registration(beat(type=kind, more=1), splitwise=True)
        assert (found.engine, found.instance.url, found.instance.role) == (
            EngineKind.VLLM,
            "http://10.0.0.1:8000",
            role,
        )
        assert found.instance.pair is not None
        assert found.instance.pair.connector is Connector.P2P_NCCL
        assert found.instance.pair.zmq_address == "10.0.0.1:21001"


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", b"{}", beat(type="X"), beat(type=1), msgpack.packb({"type": "P"}), b"x" * 100_000]
)
def test_what_is_no_beat_is_dropped(frame: bytes) -> None:
    with pytest.raises(WireError):
        registration(frame, splitwise=True)


@pytest.mark.parametrize("changes", [{"http_address": "10.0.0.1"}, {"zmq_address": "nowhere"}, {"http_address": ":1"}])
def test_an_address_that_cannot_be_used_is_named(changes: dict[str, str]) -> None:
    with pytest.raises(BadRegistration):
        registration(beat(**changes), splitwise=True)


def test_without_splitwise_it_is_refused() -> None:
    with pytest.raises(BadRegistration, match="splitwise"):
        registration(beat(), splitwise=False)


class Beats:
    """Beats over a real registry, in virtual time."""

    def __init__(self) -> None:
        self.registry = Registry(FakeTable(), SPLITWISE, 0)
        self.healthy = True
        tally: Any = Tally(memoryview(bytearray(1024)).cast("q"))
        self.beats = P2pNcclBeats(self.registry, self._register, tally, splitwise=True)

    async def _register(self, asked: Registration) -> None:
        if not self.healthy:
            raise Unhealthy("not healthy")
        self.registry.register(asked.joined(EngineKind.VLLM), 0)

    def hear(self, frame: bytes, now_ns: int) -> None:
        async def run() -> None:
            self.beats.hear(frame, now_ns)
            for _ in range(5):
                await asyncio.sleep(0)

        asyncio.run(run())


def test_three_missed_beats_end_a_member_and_the_next_one_brings_it_back() -> None:
    it = Beats()
    it.hear(beat(), 0)
    assert len(it.registry) == 1
    it.hear(beat(), 3 * SECOND_NS)
    assert it.beats.tick(3 * SECOND_NS + SILENT_NS) == []
    assert it.beats.tick(3 * SECOND_NS + SILENT_NS + 1) == ["http://10.0.0.1:8000"]
    assert len(it.registry) == 0
    it.hear(beat(), 60 * SECOND_NS)
    assert len(it.registry) == 1


def test_others_are_not_dropped() -> None:
    it = Beats()
    it.registry.register(registration(beat(http_address="10.0.0.2:1"), splitwise=True).joined(EngineKind.VLLM), 0)
    it.hear(beat(), 0)
    it.beats.tick(100 * SECOND_NS)
    assert [member.instance.url for member in it.registry] == ["http://10.0.0.2:1"]


def test_one_that_is_not_healthy_yet_is_tried_with_each_beat() -> None:
    it = Beats()
    it.healthy = False
    it.hear(beat(), 0)
    assert len(it.registry) == 0
    it.healthy = True
    it.hear(beat(), SECOND_NS)
    assert len(it.registry) == 1


def test_the_socket_is_bound_only_where_configured() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    configured = settings(server={"splitwise": True}, engines={"p2p-nccl-bind": endpoint})
    with FakeEngine(vllm()) as engine, scheduler(configured) as running:
        socket = running.kept(running.dealer("", endpoint))
        socket.send(beat(type="D", http_address=f"127.0.0.1:{engine.port}"))
        socket.send(b"\xc1 this is no msgpack")
        found = until(lambda: running.candidates(role=Role.DECODE), running.log.read_text)
        assert [instance.url for instance in found] == [engine.url]
        assert found[0].pair is not None
        assert found[0].pair.zmq_address == "10.0.0.1:21001"
