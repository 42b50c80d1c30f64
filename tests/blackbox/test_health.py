"""Sections 6 and 7, and the heartbeat of section 9: who is probed how often, who goes, who comes back."""

from __future__ import annotations

import contextlib
import http.client
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from tests.blackbox import engine as scripts
from tests.blackbox.engine import Engine
from tests.blackbox.router import Router, chat
from tests.blackbox.test_mixed import read_until
from tests.support.waiting import PATIENCE_S, until

SLOW = {
    "manager": {
        "health-failure-threshold": 3,
        "health-success-threshold": 2,
        "health-check-interval-secs": 60,
        "health-check-timeout-secs": 10.0,
    }
}


def test_thresholds_are_probes_in_a_row_and_heartbeats_are_probed(tmp_path: Path) -> None:
    """With the monitor out of the way: two good probes to come in; up to three for a heartbeat, of which one passes."""
    with Router(tmp_path, config=SLOW) as router:
        engine = router.engine(register=False)
        for probes, status in enumerate((500, 404, 302, 201), 1):
            engine.pages["/health"] = (status, b"")
            assert router.register(engine).status == 503
            assert engine.probes() == probes  # the first that fails is the last
        engine.pages["/health"] = (200, b"")
        engine.gets.clear()
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
        assert router.get("/health_generate").status == 200
        assert engine.probes() == 6  # which is for pairs alone
        assert router.metric("go_goroutines") == {}
        assert set(engine.gets) == {"/health"}  # nothing else is asked of an engine


BEAT = """
import http.client, json, sys, time
port, engine, count, interval = map(float, sys.argv[1:])
router = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
start = due = time.monotonic()
refused = k = 0
while time.monotonic() < start + 60:
    body = {"role": "mixed", "host_ip": f"127.0.0.{k % count + 1:.0f}", "port": int(engine), "connector_port": None}
    router.request("POST", "/register", json.dumps(body), {"Content-Type": "application/json"})
    answer = router.getresponse()
    answer.read()
    refused += answer.status != 200
    k += 1
    if k == count:
        print("all", refused, flush=True)
    due += interval / count
    time.sleep(max(0, due - time.monotonic()))
"""
ENGINES = 200
INTERVAL_S = 5.0
ROUNDS, FELT = 6, 2.0


def test_the_heartbeats_of_two_hundred_engines_are_not_felt(tmp_path: Path) -> None:
    """Requests one after another, in turns with and without two hundred engines that register every five seconds.

    Times within one run, in turns: what else goes on in the machine is in both.
    """
    config = {"manager": {"health-check-interval-secs": 60}, "log": {"level": "error"}}
    with Router(tmp_path, config=config) as router:
        engine = Engine("mixed", {}, host="0.0.0.0")
        router.engines.append(engine)

        def beat(interval_s: float) -> subprocess.Popen[str]:
            arguments = [router.port, engine.port, ENGINES, interval_s]
            command = [sys.executable, "-c", BEAT, *map(str, arguments)]
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

        with beat(0.5) as all_at_once:
            assert all_at_once.stdout is not None
            assert all_at_once.stdout.readline() == "all 0\n"
            all_at_once.kill()
        assert router.numbers()["mixed"] == ENGINES
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", router.port, timeout=PATIENCE_S)) as client:

            def median() -> float:
                times = []
                for _ in range(40):
                    began = time.perf_counter()
                    client.request("POST", "/v1/chat/completions", b'{"messages": []}')
                    assert client.getresponse().read()
                    times.append(time.perf_counter() - began)
                return statistics.median(times)

            ratios: list[float] = []
            while len(ratios) < ROUNDS and min(ratios, default=FELT) >= FELT:
                alone = median()
                with beat(INTERVAL_S) as beats:
                    before = engine.probes()
                    until(lambda before=before: engine.probes() > before, "the first heartbeat")
                    ratios.append(median() / alone)
                    beats.kill()
        # A request held up by a registration takes several times as long, in every round; what two processes more take
        # of the machine is less than it takes by itself, unless the machine has none to give in that round.
        assert min(ratios) < FELT, ratios


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
