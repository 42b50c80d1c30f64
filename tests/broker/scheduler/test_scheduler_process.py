"""The scheduler process as a whole: real process, real sockets, real shared memory."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from broker import wire
from broker.table import SchedulerEvent
from broker.types import EngineKind, Role
from tests.broker.scheduler.fake_engine import FakeEngine, vllm
from tests.broker.scheduler.running import NativeEngine, RunningScheduler, scheduler, settings
from tests.support.processes import free_port
from tests.support.waiting import until


@pytest.fixture
def running() -> Iterator[RunningScheduler]:
    with scheduler(settings()) as it:
        yield it


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine(vllm()) as it:
        yield it


def body(engine: FakeEngine, /, **fields: object) -> dict[str, object]:
    return {"role": "mixed", "host_ip": "127.0.0.1", "port": engine.port, **fields}


# -- registration ------------------------------------------------------------------------------------------------


def test_200_means_that_every_frontend_sees_the_instance(running: RunningScheduler, engine: FakeEngine) -> None:
    assert running.register(**body(engine)) == (200, {"code": 200, "msg": "Register success"})
    (instance,) = running.candidates("tiny")
    assert (instance.url, instance.engine, instance.models) == (engine.url, EngineKind.VLLM, ("tiny",))


def test_400_names_the_field(running: RunningScheduler) -> None:
    status, answer = running.register(role="mixed", host_ip="127.0.0.1", port=0)
    assert (status, answer["code"], answer["error"]["param"]) == (400, 400, "port")


def test_503_when_it_does_not_answer(running: RunningScheduler, engine: FakeEngine) -> None:
    status, answer = running.register(role="mixed", host_ip="127.0.0.1", port=free_port())
    assert (status, answer["error"]["code"]) == (503, "not_healthy")
    engine.answers["/health"] = (503, b"")
    assert running.register(**body(engine))[0] == 503
    assert running.urls() == []


def test_a_newcomer_passes_as_many_checks_as_one_that_comes_back(running: RunningScheduler, engine: FakeEngine) -> None:
    running.register(**body(engine))
    assert engine.asked["/health"] >= 2


def test_metadata_that_does_not_fit_is_refused(running: RunningScheduler, engine: FakeEngine) -> None:
    status, answer = running.register(**body(engine, models=["m" * 60 + str(n) for n in range(200)]))
    assert (status, answer["error"]["param"]) == (400, "models")


def test_repeated_registrations_are_not_probed(running: RunningScheduler, engine: FakeEngine) -> None:
    running.register(**body(engine))
    asked = engine.asked["/v1/models"]
    for _ in range(50):
        assert running.register(**body(engine))[0] == 200
    assert engine.asked["/v1/models"] - asked <= 2  # the watch may have asked meanwhile


def test_a_slow_newcomer_holds_up_nobody(running: RunningScheduler, engine: FakeEngine) -> None:
    with FakeEngine(vllm()) as slow, running.dealer("control.sock") as waiting:
        slow.release.clear()
        waiting.send(wire.encode(wire.Register(1, json.dumps(body(slow)).encode())))
        until(lambda: slow.asked.total(), what="the slow one is being asked")
        assert running.register(**body(engine))[0] == 200
        assert isinstance(running.engine().hello(), wire.Accepted)
        slow.release.set()
        reply = wire.decode(wire.to_frontend, waiting.recv())
        assert isinstance(reply, wire.Reply)
        assert (reply.call, reply.status) == (1, 200)


def test_kinds_are_found_by_probing(running: RunningScheduler) -> None:
    models = b'{"object":"list","data":[{"id":"m","owned_by":"%s"}]}'
    servers = {
        EngineKind.VLLM: {"/v1/models": (200, models % b"vllm"), "/health": (200, b"")},
        EngineKind.SGLANG: {"/v1/models": (200, models % b"sglang"), "/health": (200, b"")},
        EngineKind.FASTDEPLOY: {
            "/v1/models": (200, models % b"x"),
            "/health": (200, b""),
            "/metrics": (200, b"fastdeploy:num_requests_running 1\nfastdeploy:num_requests_waiting 0\n"),
        },
        EngineKind.OPENAI: {"/v1/models": (200, models % b"someone")},  # and no /health
    }
    for kind, answers in servers.items():
        with FakeEngine(answers) as server:
            assert running.register(**body(server))[0] == 200, kind
            assert {i.url: i.engine for i in running.candidates()}[server.url] is kind


def test_fastdeploy_whose_worker_is_gone_is_not_healthy(running: RunningScheduler) -> None:
    with FakeEngine({"/v1/models": (200, b'{"data":[]}')}) as server:
        assert running.register(**body(server, engine_worker_queue_port=1))[0] == 503
        assert running.register(**body(server))[0] == 200


# -- health, load, drain -----------------------------------------------------------------------------------------


def test_what_the_scheduler_counts_outlives_it(running: RunningScheduler, engine: FakeEngine) -> None:
    running.register(**body(engine))
    running.register(role="mixed", host_ip="127.0.0.1", port=0)
    running.kill()
    running.start()
    running.register(**body(engine))
    events = running.reader.events()
    assert (events[SchedulerEvent.REGISTRATIONS], events[SchedulerEvent.REGISTRATIONS_REFUSED]) == (2, 1)


def test_an_ill_instance_gets_nothing_until_it_is_well(running: RunningScheduler, engine: FakeEngine) -> None:
    running.register(**body(engine))
    engine.answers["/health"] = (500, b"")
    until(lambda: running.urls() == [], what="DOWN")
    engine.answers["/health"] = (200, b"")
    engine.answers["/v1/models"] = (200, b'{"data":[{"id":"tiny"},{"id":"adapter"}]}')
    until(lambda: running.urls("adapter") == [engine.url], what="READY, its models asked for again")


def test_load_is_polled(running: RunningScheduler, engine: FakeEngine) -> None:
    running.register(**body(engine))
    until(lambda: running.load(engine.url) == (3, 2, 250), what="the load of /metrics")
    engine.answers["/metrics"] = (200, vllm()["/metrics"][1].replace(b" 3.0", b" 30.0"))
    until(lambda: running.load(engine.url) == (30, 2, 250), what="the next load")


def test_drain_and_resume(running: RunningScheduler, engine: FakeEngine) -> None:
    running.register(**body(engine))
    status, answer = running.call(wire.Drain(3, engine.url))
    assert (status, answer["state"], running.urls()) == (200, "draining", [])
    status, answer = running.call(wire.Drain(4, engine.url, resume=True))
    assert (status, answer["state"], running.urls()) == (200, "ready", [engine.url])
    assert running.call(wire.Drain(5, "http://nobody:1"))[0] == 404


def test_sglangs_pushed_load_is_followed(running: RunningScheduler, engine: FakeEngine) -> None:
    with running.context.socket(zmq.PUB) as publisher:
        publisher.setsockopt(zmq.LINGER, 0)
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        endpoint = f"tcp://127.0.0.1:{port}"
        running.register(**body(engine, engine="sglang", load_endpoint=endpoint))
        sequence = iter(range(100_000))

        def seen(runs: int) -> bool:
            stat = msgspec.msgpack.encode(["LoadStat", runs, 1, 50, 100, 0, 10, 60, 8, 0, 0])
            publisher.send_multipart([b"load", next(sequence).to_bytes(8, "big"), stat])
            return running.load(engine.url) == (runs, 1, 500)

        until(lambda: seen(6), what="its load")
        running.kill()
        running.start()
        until(lambda: seen(7), what="its load, in the next epoch")


# -- native engines ----------------------------------------------------------------------------------------------


def test_the_life_of_a_native_engine(running: RunningScheduler) -> None:
    native = running.engine()
    assert native.beat() == wire.HelloAgain()
    assert native.hello() == wire.Accepted(wire.PROTOCOL, 1)
    (instance,) = running.candidates("m")
    assert (instance.url, instance.transfer, instance.capacity) == (native.endpoint, b"\x00opaque\xff", 4)
    assert native.beat() == wire.SchedulerBeat(1)

    def published() -> bool:
        native.beat()
        native.publish(5, 2)
        return running.load(native.endpoint) == (5, 2, 500)

    until(published, what="its load")
    native.beat(ready=False)
    assert running.urls() == []
    native.beat()
    assert running.urls() == [native.endpoint]
    native.goodbye()
    until(lambda: running.urls() == [], what="gone")


def test_a_silent_native_engine_is_taken_out_and_comes_back(running: RunningScheduler) -> None:
    native = running.engine()
    native.hello()
    until(lambda: running.urls() == [], what="DOWN for silence")
    native.beat()
    assert running.urls() == [native.endpoint]


def test_a_new_incarnation_takes_the_place_of_the_old(running: RunningScheduler) -> None:
    old = running.engine()
    old.hello()
    slot = running.slot(old.endpoint)
    new = running.engine(endpoint=old.endpoint)
    assert new.hello() == wire.Accepted(wire.PROTOCOL, 1)
    assert running.slot(old.endpoint) != slot
    assert isinstance(old.hello(), wire.Refused)


def test_a_bad_hello_is_refused(running: RunningScheduler) -> None:
    native = running.engine()
    for changes in ({"protocol": 99}, {"endpoint": "tcp://*:1"}, {"role": Role.DECODE}):
        assert isinstance(native.hello(**changes), wire.Refused)
    assert running.urls() == []


def test_a_native_engine_registered_by_somebody_else_is_asked_who_it_is(running: RunningScheduler) -> None:
    with running.context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        fields = {"role": 0, "host_ip": "127.0.0.1", "port": port, "engine": "native", "models": "m"}
        with running.dealer("control.sock") as client:
            client.send(wire.encode(wire.Register(1, json.dumps(fields).encode())))
            assert router.poll(60_000)
            peer, frame = router.recv_multipart()
            assert isinstance(wire.decode(wire.data_to_engine, frame), wire.DataHello)
            router.send_multipart([peer, wire.encode(wire.DataWelcome(wire.PROTOCOL, b"i" * 16))])
            reply = wire.decode(wire.to_frontend, client.recv())
        assert isinstance(reply, wire.Reply)
        assert reply.status == 200
        (instance,) = running.candidates("m")
        assert (instance.incarnation, instance.engine) == (b"i" * 16, EngineKind.NATIVE)


# -- succession and end ------------------------------------------------------------------------------------------


def test_after_a_kill_nobody_has_to_register_again(running: RunningScheduler, engine: FakeEngine) -> None:
    native = running.engine()
    native.hello()
    running.register(**body(engine))
    native.beat()
    before = {url: running.slot(url) for url in running.urls()}
    running.kill()
    assert {url: running.slot(url) for url in running.urls()} == before
    running.start()
    assert {url: running.slot(url) for url in running.urls()} == before
    assert native.beat() == wire.SchedulerBeat(2)
    assert native.hello() == wire.Accepted(wire.PROTOCOL, 2)


def test_a_frontend_is_welcomed_with_the_epoch(running: RunningScheduler) -> None:
    for epoch in (1, 2):
        with running.dealer("control.sock") as frontend:
            frontend.send(wire.encode(wire.FrontendHello(0, 1, 0)))
            assert wire.decode(wire.to_frontend, frontend.recv()) == wire.Welcome(epoch)
        running.kill()
        running.start()


def test_sigterm_ends_it_cleanly_even_while_it_asks(running: RunningScheduler, engine: FakeEngine) -> None:
    engine.release.clear()
    with running.dealer("control.sock") as client:
        client.send(wire.encode(wire.Register(1, json.dumps(body(engine)).encode())))
        until(lambda: engine.asked.total(), what="being asked")
        assert running.stop() == 0
    assert "Traceback" not in running.log.read_text()


def test_the_supervisors_death_ends_it(running: RunningScheduler) -> None:
    os.close(running.alive_end)
    assert running.ended() == 0


def test_ctrl_c_is_the_supervisors_business(running: RunningScheduler, engine: FakeEngine) -> None:
    assert running.process is not None
    running.process.send_signal(signal.SIGINT)
    assert running.register(**body(engine))[0] == 200


def test_an_address_in_use_is_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with scheduler(settings(engines={"control-bind": bind}), started=False) as it:
            with pytest.raises(AssertionError, match="cannot bind the sockets for engines"):
                it.start()
            assert it.ended() == 1


def test_engines_of_other_machines_come_by_tcp() -> None:
    control, load = f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
    with scheduler(settings(engines={"control-bind": control, "load-bind": load})) as it:
        native = it.engine(control=control, load=load)
        native.hello()

        def published() -> bool:
            native.beat()
            native.publish(1, 0)
            return it.load(native.endpoint) == (1, 0, 500)

        until(published, what="its load")


def test_missing_segments_are_a_sentence(tmp_path: Path) -> None:
    with scheduler(settings(), started=False) as it:
        (it.run_dir / "load").unlink()
        with pytest.raises(AssertionError, match="cannot start"):
            it.start()
        assert it.ended() == 1


# -- register.yaml -----------------------------------------------------------------------------------------------


def test_register_yaml_has_its_first_pass_before_ready_and_is_tried_again(engine: FakeEngine, tmp_path: Path) -> None:
    port = free_port()
    listed = tmp_path / "register.yaml"
    listed.write_text(
        f"""
        instances:
          - role: mixed
            host_ip: 127.0.0.1
            port: {engine.port}
          - {{role: "mixed", host_ip: 127.0.0.1, port: "{port}"}}
          - {{role: "mixed", host_ip: 127.0.0.1, port: 0}}
          - nonsense
        """
    )
    with scheduler(settings(manager={"register-path": str(listed)})) as it:
        assert it.urls() == [engine.url]
        log = it.log.read_text()
        assert "instances[2]: port must be" in log
        assert "instances[3]" in log
        with FakeEngine(vllm(), port=port) as late:
            until(lambda: late.url in it.urls(), what="the late one, registered by trying again")
        assert it.log.read_text().count("is not registered yet") == 1


@pytest.mark.parametrize("text", ["", "instances: []\n", "instances:\n", "[", "instances: 5\n", "- x\n", None])
def test_a_useless_register_yaml_does_not_stop_the_start(text: str | None, tmp_path: Path) -> None:
    listed = tmp_path / "register.yaml"
    if text is not None:
        listed.write_text(text)
    with scheduler(settings(manager={"register-path": str(listed)})) as it:
        assert it.urls() == []
        assert ("ERROR" in it.log.read_text()) is (text not in ("", "instances: []\n", "instances:\n"))


# -- garbage -----------------------------------------------------------------------------------------------------


def malformed(rng: random.Random) -> list[bytes]:
    """Frames that a peer might send by mistake or by malice."""
    valid = wire.encode(wire.EngineBeat(b"i" * 16, 4))
    mutated = bytearray(valid)
    mutated[rng.randrange(len(mutated))] = rng.randrange(256)
    return rng.choice(
        [
            [b""],
            [b"", valid],
            [valid, valid, valid],
            [rng.randbytes(rng.randrange(1, 200))],
            [bytes(mutated)],
            [valid[: rng.randrange(len(valid))]],
            [b"\x91" * 10_000],
            [bytes(wire.MAX_CONTROL_BYTES + 1)],
            [msgspec.msgpack.encode([99, 1])],
            [msgspec.msgpack.encode([32, 1, b"i" * 16, "tcp://h:1", 77, [], 1 << 63])],
            [msgspec.msgpack.encode([2, 1 << 70 if rng.random() < 0 else -1, b"{"])],
        ]
    )


@pytest.mark.parametrize("name", ["control.sock", "engines.sock"])
def test_malformed_frames_are_dropped_and_serving_goes_on(
    name: str, running: RunningScheduler, engine: FakeEngine
) -> None:
    rng = random.Random(5)
    native = running.engine()
    native.hello()
    with running.dealer(name) as foreign:
        for _ in range(500):
            foreign.send_multipart(malformed(rng))
        foreign.send_multipart([b"x", b"y"])
        assert running.register(**body(engine))[0] == 200
        assert native.beat() == wire.SchedulerBeat(1)
        until(lambda: "said once per peer" in running.log.read_text(), what="the first one logged")
        # A few of the mutated ones are valid.
        until(lambda: running.reader.events()[SchedulerEvent.FRAMES_DROPPED] > 400, what="all of them counted")
    log = running.log.read_text()
    assert log.count("said once per peer") == 1
    assert "Traceback" not in log


def test_a_frame_beyond_every_limit_costs_only_its_sender(running: RunningScheduler) -> None:
    native = running.engine()
    native.hello()
    with running.dealer("engines.sock") as foreign:
        foreign.send(bytes(8 * 1024 * 1024))
        assert native.beat() == wire.SchedulerBeat(1)


def test_malformed_loads_are_dropped_and_good_ones_applied(running: RunningScheduler) -> None:
    rng = random.Random(6)
    native = running.engine()
    native.hello()
    with running.context.socket(zmq.PUB) as foreign:
        foreign.setsockopt(zmq.LINGER, 0)
        foreign.connect(f"ipc://{running.run_dir / 'load.sock'}")

        def applied() -> bool:
            native.beat()
            for frames in ([b"load"], [b"load", *malformed(rng)], [b"load", b"8 bytes.", *malformed(rng)]):
                foreign.send_multipart(frames)
            native.publish(9, 9, incarnation=b"nobody's, unknow")
            native.publish(6, 1)
            return running.load(native.endpoint) == (6, 1, 500) and "said once per peer" in running.log.read_text()

        until(applied, what="good load among bad")
    assert "Traceback" not in running.log.read_text()


def test_a_burst_of_messages_is_answered_whole(running: RunningScheduler) -> None:
    """More than several drains' worth: none may be left behind by an edge that was missed."""
    native = running.engine()
    native.hello()
    with running.dealer("engines.sock") as peer:
        beat = wire.encode(wire.EngineBeat(native.incarnation, 4))
        for _ in range(3000):
            peer.send(beat)
        for _ in range(3000):
            assert wire.decode(wire.to_engine, peer.recv()) == wire.SchedulerBeat(1)


def test_a_peer_that_vanishes_before_its_answer_is_nobodys_trouble(
    running: RunningScheduler, engine: FakeEngine
) -> None:
    engine.release.clear()
    with running.dealer("control.sock") as leaving:
        leaving.send(wire.encode(wire.Register(1, json.dumps(body(engine)).encode())))
        until(lambda: engine.asked.total(), what="being asked")
    engine.release.set()
    until(lambda: running.urls() == [engine.url], what="registered all the same")
    assert isinstance(NativeEngine(running).hello(), wire.Accepted)
