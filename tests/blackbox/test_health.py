"""Sections 6 and 7, and the heartbeat of section 9: who is probed how often, who goes, who comes back."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

import psutil

from tests.blackbox import engine as scripts
from tests.blackbox.router import Router, chat
from tests.blackbox.test_mixed import read_until
from tests.support.waiting import until

SLOW = {
    "manager": {
        "health-failure-threshold": 3,
        "health-success-threshold": 2,
        "health-check-interval-secs": 60,
        "health-check-timeout-secs": 1.0,
    }
}


def test_thresholds_are_probes_in_a_row_and_heartbeats_are_probed(tmp_path: Path) -> None:
    """With the monitor out of the way: two good probes to come in; up to three for a heartbeat, of which one passes."""
    with Router(tmp_path, config=SLOW) as router:
        engine = router.engine(register=False)
        assert router.register(engine).status == 200
        assert engine.probes() == 2
        assert router.register(engine).status == 200
        assert engine.probes() == 3
        engine.pages["/health"] = (500, b"")
        answer = router.register(engine)
        assert answer.status == 503
        assert answer.body.decode() == f'{{"code":503,"msg":"{engine.url} service is not healthy"}}'
        assert engine.probes() == 6
        assert router.numbers()["mixed"] == 1  # a heartbeat that fails takes nobody out
        assert router.metric("go_goroutines") == {}
        assert set(engine.gets) == {"/health"}  # nothing else is asked of an engine
        latency_while_two_hundred_engines_register(router)


def latency_while_two_hundred_engines_register(router: Router) -> None:
    """Forty heartbeats a second, as two hundred engines send them, beside requests one after another."""
    engine = router.engine()
    rest = [router.registered()["mixed"][0]["url"]]
    assert rest

    def median() -> float:
        times = []
        for _ in range(40):
            began = time.perf_counter()
            assert router.chat().status == 200
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    alone, over = median(), threading.Event()

    def beat() -> None:
        while not over.wait(1 / 40):
            assert router.register(engine).status == 200

    beating = threading.Thread(target=beat)
    beating.start()
    beside = median()
    over.set()
    beating.join()
    # The load of test and fake engine, which share the machine, is in it: a request held up by a probe takes far more.
    assert beside < 4 * alone, (alone, beside)


def test_a_dead_instance_is_deleted_and_comes_back_when_it_registers(mixed: Router) -> None:
    engine = mixed.engine()
    engine.pages["/health"] = (503, b"")
    mixed.await_number(0)
    mixed.await_line(rf"\[ERROR\] .*: Removed unhealthy mixed instance: {engine.url}", "err")
    mixed.await_line(rf"\[INFO\] .*: cleanup unhealthy worker counter: {engine.url}", "out")
    before = engine.probes()
    assert mixed.register(engine).status == 503
    engine.pages["/health"] = (200, b"")
    assert engine.probes() == before + 1  # and nobody asks an instance that is no member
    assert mixed.numbers()["mixed"] == 0
    assert mixed.register(engine).status == 200
    assert mixed.numbers()["mixed"] == 1


def test_requests_of_a_removed_instance_go_on(mixed: Router) -> None:
    engine, go = mixed.engine(), threading.Event()

    def script(handler: scripts.Handler) -> None:
        handler.start_stream()
        handler.chunk(b"data: 1\n\n")
        if handler.until_cut(go):
            handler.chunk(b"data: 2\n\n")
            handler.end_stream()

    engine.script = script
    with mixed.open("/v1/chat/completions", chat(stream=True)) as connection:
        read_until(connection, b"data: 1")
        engine.pages["/health"] = (500, b"")
        mixed.await_number(0)
        preserved = r"\[INFO\] .*: unhealthy worker counter preserved \(inflight requests\): "
        mixed.await_line(rf"{preserved}{engine.url}, count: 1", "out")
        mixed.await_line(r"\[INFO\] .*: preserved counters for 1 workers with inflight requests: \[.*\]", "out")
        go.set()
        assert b"data: 2" in read_until(connection, b"0\r\n\r\n")
    mixed.await_line(rf"\[INFO\] .*: removed counters for 1 unhealthy workers: \[{engine.url}\]", "out")


def test_failing_requests_do_not_take_an_instance_out(mixed: Router) -> None:
    engine = mixed.engine()
    engine.script = scripts.reset
    assert mixed.chat().status == 502
    before = engine.probes()
    until(lambda: engine.probes() > before, "the next health check")
    assert mixed.numbers()["mixed"] == 1


def test_an_engine_that_beats_outlives_the_scheduler_and_the_router(tmp_path: Path) -> None:
    """The payload of a FastDeploy engine, nulls and extra keys included, every so often for ever."""
    fields = {"connector_port": None, "rdma_ports": None, "is_paused": False, "version": None, "metrics_port": None}
    with Router(tmp_path) as router:
        engine = router.engine(**fields)
        for child in psutil.Process(router.process.pid).children():
            if "broker.scheduler" in child.cmdline():
                child.kill()
        assert router.chat().status == 200
        assert router.numbers()["mixed"] == 1
        until(lambda: router.register(engine).status == 200, "the next scheduler to hear it")
        assert router.numbers()["mixed"] == 1
        port, registration = router.port, engine.registration
        router.engines.clear()
    with Router(tmp_path, f"--port={port}", port=port) as router:
        assert router.numbers()["mixed"] == 0
        assert router.post("/register", registration).status == 200
        assert router.chat().json()["from"] == engine.port
    engine.close()
