"""Every connector's pairs over real transports: what both halves see, what ends what, and what is held.

The engines do what the test says (`tests.support.fake_engines`); nothing of Penstock reads their bytes for them.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
import zmq

from broker.config import Server, Timeouts
from broker.errors import PenstockError, UpstreamBroken, UpstreamTimeout
from broker.route import RouteRequest
from broker.types import Connector, EngineKind, FastDeployFields, PairFields, Role
from frontend.breaker import Breaker
from frontend.dispatch import Dispatcher, make_policies
from frontend.forward import Forward
from frontend.forwarder import Forwarder
from frontend.pair import Pairer
from frontend.upstream.base import UpstreamRequest
from frontend.upstream.http import HttpUpstream
from frontend.upstream.zmq import ZmqUpstream
from tests.support.fake_engines import HttpEngine, ZmqEngine
from tests.support.sinks import RecordingSink
from tests.support.table import Run
from tests.support.waiting import PATIENCE_S, eventually

BODY = b'{"prompt" : "hello", "max_tokens":5, "big": 9007199254740993, "stream":true}'
GIVEN = b'{"remote_request_id": "cmpl-1",  "remote_block_ids":[[1, 2]], "new":18446744073709551615}'
KINDS = {
    Connector.DISAGGREGATE_INFO: EngineKind.FASTDEPLOY,
    Connector.BOOTSTRAP: EngineKind.SGLANG,
    Connector.NIXL: EngineKind.VLLM,
    Connector.MOONCAKE: EngineKind.VLLM,
    Connector.P2P_NCCL: EngineKind.VLLM,
    Connector.NATIVE: EngineKind.NATIVE,
}
SEQUENTIAL = (Connector.NIXL, Connector.P2P_NCCL, Connector.NATIVE)

Engine = HttpEngine | ZmqEngine
Asked = Any
"""`HttpAsked` or `ZmqAsked`; tests look at what the two have in common, `matches` at the rest."""


class Stage:
    """Two prefill and two decode engines of one connector, and a frontend over them."""

    def __init__(
        self, path: Path, connector: Connector, context: zmq.Context[zmq.Socket[bytes]], first_byte_s: float
    ) -> None:
        self.connector = connector
        self.sequential = connector in SEQUENTIAL
        self.run = Run(path, slots=8)
        self.config = msgspec.structs.replace(
            self.run.config, server=Server(splitwise=True), timeouts=Timeouts(first_byte_secs=first_byte_s)
        )
        self.engines: dict[Role, list[Engine]] = {Role.PREFILL: [], Role.DECODE: []}
        self.asked: dict[Role, asyncio.Queue[Asked]] = {role: asyncio.Queue() for role in self.engines}
        self.slots: dict[Role, list[int]] = {role: [] for role in self.engines}
        self.sinks: list[RecordingSink] = []
        self._context = context
        loop = asyncio.get_running_loop()
        self.http, self.native = HttpUpstream(self.config), ZmqUpstream(self.config)
        counters = self.run.frontend(0)
        dispatcher = Dispatcher(self.run.reader, counters, make_policies(self.config, 0), Breaker(3, 5.0))
        pairer = Pairer.over(self.run.reader, dispatcher, loop, self.config)
        self.forwarder = Forwarder(self.config, pairer, counters, self.http, self.native, loop)

    async def add(self, role: Role, count: int = 2) -> None:
        for _ in range(count):
            engine: Engine = (
                await ZmqEngine.open(self._context) if self.connector is Connector.NATIVE else await HttpEngine.open()
            )
            engine.on_request = self.asked[role].put_nowait
            self.engines[role].append(engine)
            n = len(self.slots[role])
            instance = msgspec.structs.replace(
                engine.instance,
                role=role,
                engine=KINDS[self.connector],
                fastdeploy=FastDeployFields(connector_port=f"70{n}{int(role)}"),
                transfer=f"{role.name} {n}".encode(),
                pair=PairFields(
                    connector=self.connector,
                    bootstrap_port=9000 + n,
                    zmq_address=f"10.0.0.{n}:21{int(role)}",
                    engine_ids=(f"engine {n}",),
                ),
            )
            self.slots[role].append(self.run.writer.admit(instance, self.run.clock()))

    def close(self) -> None:
        self.http.close()
        self.native.close()
        for engine in (*self.engines[Role.PREFILL], *self.engines[Role.DECODE]):
            engine.close()
        self.run.__exit__()

    # -- the client --------------------------------------------------------------------------------------------

    def send(self, *, stream: bool = True) -> RecordingSink:
        sink = RecordingSink()
        self.sinks.append(sink)
        route = RouteRequest(prompt_tokens=10)
        request = UpstreamRequest(
            path="/v1/completions", headers=[(b"x-request-id", b"id-1")], body=BODY, stream=stream, request_id="r-1"
        )
        forward: Forward = self.forwarder.forward(b"id-1", route, request, sink)
        sink.call = forward
        forward.begin()
        return sink

    # -- the engines -------------------------------------------------------------------------------------------

    async def prefill(self) -> Asked:
        return await asyncio.wait_for(self.asked[Role.PREFILL].get(), PATIENCE_S)

    async def decode(self) -> Asked:
        return await asyncio.wait_for(self.asked[Role.DECODE].get(), PATIENCE_S)

    def prefilled(self, asked: Asked) -> None:
        """What a prefill of this connector answers."""
        asked.done(b'{"kv_transfer_params":' + GIVEN + b"}" if self.connector is Connector.NIXL else b"{}")

    async def both(self) -> tuple[Asked, Asked]:
        """Both halves have the request; a sequential prefill has answered."""
        prefill = await self.prefill()
        if self.sequential:
            assert self.asked[Role.DECODE].empty()
            self.prefilled(prefill)
        return prefill, await self.decode()

    def answer(self, data: bytes) -> bool:
        """The decode that was not given up answers; those of earlier attempts may have been asked before it."""
        while not self.asked[Role.DECODE].empty():
            decode = self.asked[Role.DECODE].get_nowait()
            if not decode.aborted.is_set():
                decode.done(data)
        return not self.forwarder.live

    def kill(self, asked: Asked) -> None:
        asked.engine.die()

    # -- what is held ------------------------------------------------------------------------------------------

    def held(self) -> tuple[int, int]:
        counters = self.run.reader.counters
        prefill, decode = (sum(counters.in_flight(slot)[0] for slot in self.slots[role]) for role in self.engines)
        return prefill, decode

    async def idle(self) -> None:
        await eventually(lambda: self.held() == (0, 0) and not self.forwarder.live, self.held)


Scene = Callable[[Stage], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture(params=list(Connector), ids=str)
def connector(request: pytest.FixtureRequest) -> Connector:
    found: Connector = request.param
    return found


@pytest.fixture
def play(connector: Connector, tmp_path: Path) -> Play:
    """Runs a scene; afterwards nothing is held and no client heard what it may not hear."""

    async def run(scene: Scene, first_byte_s: float) -> None:
        with zmq.Context() as context:
            stage = Stage(tmp_path, connector, context, first_byte_s)
            try:
                for role in stage.engines:
                    await stage.add(role)
                await scene(stage)
                await stage.idle()
            finally:
                stage.close()
            for sink in stage.sinks:
                sink.check()

    def play(scene: Scene, *, first_byte_s: float = 0.0) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run(scene, first_byte_s))

    return play


async def ended(sink: RecordingSink) -> None:
    await asyncio.wait_for(sink.ended.wait(), PATIENCE_S)


async def gone(asked: Asked) -> None:
    """The frontend has given it up."""
    await asyncio.wait_for(asked.aborted.wait(), PATIENCE_S)


def matches(stage: Stage, prefill: Asked, decode: Asked, *, again: bool = False) -> None:
    """Both halves were told what this connector needs, of this prefill, and the rest byte for byte."""
    assert prefill.path == decode.path == "/v1/completions"
    kept = BODY[:-1]
    to_prefill, to_decode = json.loads(prefill.body), json.loads(decode.body)
    n = stage.engines[Role.PREFILL].index(prefill.engine)
    m = stage.engines[Role.DECODE].index(decode.engine)
    match stage.connector:
        case Connector.DISAGGREGATE_INFO:
            assert prefill.body == decode.body
            assert prefill.body.startswith(kept + b",")
            info = to_decode["disaggregate_info"]
            assert (info["prefill_connector_port"], info["decode_connector_port"]) == (7001 + 10 * n, 7002 + 10 * m)
            assert to_decode["request_id"] == ("r-1-retry1" if again else "r-1")  # engines refuse a name they know
        case Connector.BOOTSTRAP:
            assert prefill.body == decode.body
            assert prefill.body.startswith(kept + b",")
            assert to_decode["bootstrap_port"] == 9000 + n
        case Connector.NIXL:
            assert decode.body == kept + b',"kv_transfer_params":' + GIVEN + b"}"
            assert to_prefill["kv_transfer_params"]["do_remote_decode"] is True
            assert (to_prefill["max_tokens"], to_prefill["stream"], to_prefill["big"]) == (1, False, 9007199254740993)
        case Connector.MOONCAKE:
            asked, given = to_prefill["kv_transfer_params"], to_decode["kv_transfer_params"]
            assert asked["transfer_id"] == given["transfer_id"]
            assert given["remote_bootstrap_addr"] == f"http://127.0.0.1:{9000 + n}"
            assert given["remote_engine_id"] == f"engine {n}"
            assert decode.body.startswith(kept + b",")
            assert to_prefill["max_tokens"] == 1
        case Connector.P2P_NCCL:
            names = [re.findall(rb"x-request-id: (\S+)", asked.head, re.I) for asked in (prefill, decode)]
            assert names[0] == names[1]
            addresses = f"___prefill_addr_10.0.0.{n}:211___decode_addr_10.0.0.{m}:212_"
            assert re.fullmatch(addresses.encode() + rb"[0-9a-f]{32}", *names[0])
            assert decode.body == BODY
            assert to_prefill["max_tokens"] == 1
        case Connector.NATIVE:
            assert (prefill.transfer, decode.transfer) == (f"DECODE {m}".encode(), f"PREFILL {n}".encode())
            assert prefill.body == decode.body == BODY
            assert (prefill.stream, decode.stream) == (False, True)
            assert prefill.headers["x-request-id"] == decode.headers["x-request-id"] == "id-1"


def test_a_streamed_answer_is_decodes_and_names_both(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        sink = stage.send()
        prefill, decode = await stage.both()
        matches(stage, prefill, decode)
        assert stage.held()[1] == 1
        decode.chunk(b"data: a\n\n")
        await eventually(lambda: sink.body == b"data: a\n\n", sink)
        assert stage.held() == (0, 1)
        decode.done(b"data: [DONE]\n\n")
        await ended(sink)
        assert sink.body == b"data: a\n\ndata: [DONE]\n\n"
        urls = prefill.engine.instance.url, decode.engine.instance.url
        found = sink.header(b"X-Router-Prefill-Url"), sink.header(b"X-Router-Decode-Url")
        assert found == tuple(url.encode() for url in urls)
        if not stage.sequential:
            await gone(prefill)  # its answer never came

    play(scene)


def test_an_unstreamed_answer_is_decodes(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        sink = stage.send(stream=False)
        prefill, decode = await stage.both()
        if not stage.sequential:
            stage.prefilled(prefill)
            await eventually(lambda: stage.held() == (0, 1), stage.held)
        decode.done(b'{"text": "x"}')
        await ended(sink)
        assert (sink.status, sink.body) == (200, b'{"text": "x"}')

    play(scene)


def test_a_dead_prefill_is_passed_over(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        dead, alive = stage.engines[Role.PREFILL]
        dead.die()
        for _ in range(2):  # one of them at least meets it
            sink = stage.send()
            prefill = await stage.prefill()
            assert prefill.engine is alive
            if stage.sequential:
                stage.prefilled(prefill)
            await eventually(lambda: stage.answer(b"text"), "the decode of the living pair")
            await ended(sink)
            assert sink.body == b"text"

    play(scene)


def test_a_decode_that_dies_before_its_first_byte_costs_another_pair(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        sink = stage.send()
        prefill, decode = await stage.both()
        stage.kill(decode)
        if not stage.sequential:
            await gone(prefill)
        second = await stage.both()
        matches(stage, *second, again=True)
        assert second[1].engine is not decode.engine
        second[1].done(b"text")
        await ended(sink)
        assert sink.body == b"text"

    play(scene)


def test_a_prefill_that_dies_before_its_answer_costs_another_pair(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        sink = stage.send()
        prefill = await stage.prefill()
        decode = None if stage.sequential else await stage.decode()
        stage.kill(prefill)
        if decode is not None:
            await gone(decode)
        second = await stage.both()
        matches(stage, *second, again=True)
        assert second[0].engine is not prefill.engine
        second[1].done(b"text")
        await ended(sink)
        assert sink.body == b"text"

    play(scene)


@pytest.mark.parametrize("half", ["prefill", "decode"])
@pytest.mark.parametrize("status", [400, 429])
def test_a_refusal_passes_through_and_ends_the_other_half(play: Play, half: str, status: int) -> None:
    async def scene(stage: Stage) -> None:
        sink = stage.send()
        if half == "prefill":
            prefill = await stage.prefill()
            other = None if stage.sequential else await stage.decode()
            prefill.refuse(status, b'{"error": {}}')
        else:
            prefill, decode = await stage.both()
            other = None if stage.sequential else prefill
            decode.refuse(status, b'{"error": {}}')
        await ended(sink)
        assert (sink.status, sink.body) == (status, b'{"error": {}}')
        if other is not None:
            await gone(other)

    play(scene)


@pytest.mark.parametrize("when", ["prefill", "decode", "flowing"])
def test_a_client_that_leaves_ends_both_halves(play: Play, when: str) -> None:
    async def scene(stage: Stage) -> None:
        sink = stage.send()
        if when == "prefill":
            prefill = await stage.prefill()
            under_way = [prefill] if stage.sequential else [prefill, await stage.decode()]
        else:
            prefill, decode = await stage.both()
            under_way = [decode] if stage.sequential else [prefill, decode]
            if when == "flowing":
                decode.chunk(b"x")
                await eventually(lambda: sink.body == b"x", sink)
        sink.leave()
        assert stage.held() == (0, 0)
        for asked in under_way:
            await gone(asked)

    play(scene)


@pytest.mark.parametrize("half", ["prefill", "decode"])
def test_a_half_that_hangs_is_ended_in_time(play: Play, half: str) -> None:
    async def scene(stage: Stage) -> None:
        sink = stage.send()
        if half == "prefill" and stage.sequential:
            under_way = [await stage.prefill()]
        else:
            prefill, decode = await stage.both()
            under_way = [decode] if stage.sequential else [prefill, decode]
        await ended(sink)
        assert isinstance(sink.error, UpstreamTimeout)
        for asked in under_way:
            await gone(asked)

    play(scene, first_byte_s=0.2)


def test_a_decode_that_dies_after_its_first_byte_is_an_explicit_error(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        sink = stage.send()
        prefill, decode = await stage.both()
        decode.chunk(b"x")
        await eventually(lambda: sink.body == b"x", sink)
        stage.kill(decode)
        await ended(sink)
        assert isinstance(sink.error, UpstreamBroken)
        if not stage.sequential:
            await gone(prefill)

    play(scene)


def test_all_dead_is_an_error_and_no_hang(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        for engines in stage.engines.values():
            for engine in engines:
                engine.die()
        sink = stage.send()
        await ended(sink)
        assert isinstance(sink.error, PenstockError)
        assert sink.error.status in (502, 503, 504)

    play(scene)
