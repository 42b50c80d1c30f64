"""The routes for people and tools."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette

from broker import wire
from broker.config import Engines, Models
from broker.counters import CounterColumn, attach_counters
from broker.errors import SchedulerAway, UpstreamBroken
from broker.lease import take
from broker.table import QueueColumn, State
from broker.types import EngineKind, Instance, LoadReport, Role
from frontend.admin import MAX_BODY_BYTES, Admin
from frontend.api import Inference
from frontend.app import application
from frontend.control import Control
from frontend.fastdeploy import FastDeployRoutes
from frontend.metrics import CONTENT_TYPE, Metrics
from tests.frontend.asgi import Exchange, ask
from tests.frontend.fakes import Client, Frontend

A, B = "http://10.0.0.1:80", "http://10.0.0.2:80"


class FakeControl:
    """A scheduler that answers at once, or is away."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.reply: wire.Reply | None = wire.Reply(1, 200, b'{"done": true}')

    async def register(self, body: bytes) -> wire.Reply:
        return self._answer("register", body)

    async def drain(self, url: str, *, resume: bool) -> wire.Reply:
        return self._answer("drain", url, resume)

    async def explain_request(self, ident: str) -> wire.Reply:
        return self._answer("explain", ident)

    def explain(self, ident: str) -> list[bytes]:
        """What this frontend itself knows."""
        return [b'{"id": "known"}'] if ident == "known" else []

    def _answer(self, *asked: object) -> wire.Reply:
        self.asked.append(asked)
        if self.reply is None:
            raise SchedulerAway("away")
        return self.reply


class Site:
    """All routes over one fake frontend."""

    def __init__(self, frontend: Frontend, path: Path) -> None:
        self.frontend = frontend
        self.control = FakeControl()
        self.metrics = Metrics(frontend.run.reader, attach_counters(path, frontend.config))
        admin = Admin(
            Path("/dev/shm/penstock-30000-0a1b2c3d"),
            frontend.config,
            frontend.run.reader,
            cast("Control", self.control),
            self.metrics,
        )
        self.app: Starlette = application(
            Inference(frontend.config, frontend.forwarder),
            admin,
            FastDeployRoutes(frontend.run.reader, cast("Control", self.control)),
        )
        frontend.run.writer.mark_ready()
        frontend.run.writer.beat(time.monotonic_ns())

    def get(self, path: str) -> Exchange:
        return asyncio.run(ask(self.app, path, method="GET", headers=[(b"host", b"router.example:30000")]))

    def post(self, path: str, *body: bytes) -> Exchange:
        return asyncio.run(ask(self.app, path, *body))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    aliases = {"gpt": "tiny", "nowhere": "unserved"}
    engines = Engines(control_bind="tcp://0.0.0.0:30100", load_bind="tcp://10.0.0.9:30101")
    with Frontend(tmp_path, A, B, models=Models(aliases=aliases), engines=engines) as frontend:
        yield Site(frontend, tmp_path)


# -- routes that do not exist ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/v1"), ("POST", "/v2/chat"), ("GET", "/health/")])
def test_what_is_not_there_is_a_404_in_the_apis_form(site: Site, method: str, path: str) -> None:
    exchange = asyncio.run(ask(site.app, path, method=method))
    assert exchange.status == 404
    assert exchange.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/register", "POST"), ("GET", "/v1/chat/completions", "POST"), ("POST", "/metrics", "GET, HEAD")],
)
def test_the_wrong_method_is_a_405_that_names_the_right_one(site: Site, method: str, path: str, allowed: str) -> None:
    exchange = asyncio.run(ask(site.app, path, method=method))
    assert exchange.status == 405
    assert exchange.json()["error"]["code"] == "method_not_allowed"
    assert set(exchange.headers["allow"].split(", ")) == set(allowed.split(", "))


# -- changes to the fleet ----------------------------------------------------------------------------------------


def test_a_registration_goes_to_the_scheduler_as_it_came_and_its_answer_comes_back(site: Site) -> None:
    site.control.reply = wire.Reply(1, 400, b'{"error": {"message": "port"}}')
    exchange = site.post("/register", b'{"role": ', b'"mixed"}')
    assert site.control.asked == [("register", b'{"role": "mixed"}')]
    assert (exchange.status, exchange.body) == (400, b'{"error": {"message": "port"}}')
    assert exchange.headers["content-type"] == "application/json"


def test_without_the_scheduler_changes_are_refused(site: Site) -> None:
    site.control.reply = None
    for path, body in (("/register", b"{}"), ("/drain", b'{"url": "http://a"}')):
        exchange = site.post(path, body)
        assert (exchange.status, exchange.json()["error"]["code"]) == (503, "scheduler_away")
        assert exchange.headers["retry-after"] == "1"


def test_a_registration_that_no_message_can_carry_is_refused(site: Site) -> None:
    assert site.post("/register", b"x" * (MAX_BODY_BYTES + 1)).status == 413
    assert site.control.asked == []
    assert len(wire.encode(wire.Register(2**63, b"x" * MAX_BODY_BYTES))) <= wire.MAX_CONTROL_BYTES


def test_draining_and_taking_back(site: Site) -> None:
    site.post("/drain", b'{"url": "http://a"}')
    site.post("/drain", b'{"url": "http://a", "resume": true}')
    assert site.control.asked == [("drain", "http://a", False), ("drain", "http://a", True)]


@pytest.mark.parametrize("body", [b"", b"{}", b'{"url": 5}', b'{"url": "a", "resume": "x"}', b"[]", b"\xff"])
def test_a_bad_drain_is_refused(site: Site, body: bytes) -> None:
    assert site.post("/drain", body).status == 400
    assert site.control.asked == []


# -- the fleet ---------------------------------------------------------------------------------------------------


def test_instances_are_shown_with_state_load_and_transfer(site: Site) -> None:
    run = site.frontend.run
    native = Instance(
        url="tcp://10.0.0.3:5",
        engine=EngineKind.NATIVE,
        role=Role.MIXED,
        incarnation=b"\x01" * 16,
        transfer=b'{"nccl": [1]}',
    )
    slot = run.writer.admit(native, run.clock())
    run.writer.report(slot, LoadReport(running=3, waiting=1, kv_permille=250), time.monotonic_ns())
    run.writer.describe(site.frontend.slots[B], Instance(url=B, transfer=b"\x00\xff"))
    run.writer.set_state(site.frontend.slots[B], State.DOWN)
    site.frontend.begin()
    shown = site.get("/instances").json()
    rows = {row["url"]: row for row in shown["instances"]}
    assert list(rows) == [A, B, native.url]
    assert (rows[A]["state"], rows[B]["state"]) == ("ready", "down")
    assert (rows[native.url]["running"], rows[native.url]["kv_use"], rows[native.url]["trust"]) == (3, 0.25, "exact")
    assert rows[native.url]["transfer"] == {"nccl": [1]}
    assert rows[native.url]["incarnation"] == "01" * 16
    assert rows[B]["transfer"] == {"base64": "AP8="}
    assert rows[A]["running"] is None
    assert sum(row["in_flight"] for row in rows.values()) == 1
    assert shown["scheduler"] == {"state": "alive", "epoch": 1}


# -- the queue, and why ------------------------------------------------------------------------------------------

IN_LINE = {
    QueueColumn.TICKETS: 3,
    QueueColumn.TOKENS: 40,
    QueueColumn.RESERVED: 1,
    QueueColumn.GRANTED: 10,
    QueueColumn.WAITED_US: 2_500_000,
    QueueColumn.STOLEN: 4,
    QueueColumn.ROBBED: 2,
    QueueColumn.RETURNED: 1,
}
SHOWN = {
    "tickets": 3,
    "tokens": 40,
    "reserved": 1,
    "lent": 0,
    "granted": 10,
    "wait_s": 2.5,
    "stolen": 4,
    "robbed": 2,
    "returned": 1,
    "rescued": 1,
}


def fill_queue(site: Site) -> None:
    """At A; one request was rescued from it."""
    run, slot = site.frontend.run, site.frontend.slots[A]
    for column, value in IN_LINE.items():
        run.writer.queue[column * run.writer.slots + slot] = value
    lease = take(run.reader, site.frontend.counters, slot, 1)
    assert lease is not None
    lease.count(CounterColumn.RESCUED)
    lease.close()


def test_the_queue_is_shown_by_instance(site: Site) -> None:
    fill_queue(site)
    answer = site.get("/queue").json()
    assert (answer["tickets"], answer["tokens"]) == (3, 40)
    first, second = answer["instances"]
    assert first == {"url": A, **SHOWN}
    assert second == {"url": B, **dict.fromkeys(SHOWN, 0)}


def test_metrics_show_the_queue_by_instance(site: Site) -> None:
    fill_queue(site)
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(site.metrics.text().decode())
        for sample in family.samples
        if sample.labels.get("instance") == A
    }
    assert {
        "tickets": found["penstock_queue_tickets"],
        "tokens": found["penstock_queue_tokens"],
        "lent": found["penstock_queue_lent"],
        "granted": found["penstock_queue_granted_total"],
        "wait_s": found["penstock_queue_waited_seconds_total"],
        "stolen": found["penstock_queue_stolen_total"],
        "robbed": found["penstock_queue_robbed_total"],
        "returned": found["penstock_queue_returned_total"],
        "rescued": found["penstock_instance_rescued_requests_total"],
    } == {name: value for name, value in SHOWN.items() if name != "reserved"}


def test_why_is_asked_of_every_frontend_through_the_scheduler(site: Site) -> None:
    site.control.reply = wire.Reply(1, 200, b'{"requests": [{"id": "a/b"}], "silent_frontends": 0}')
    exchange = site.get("/explain/a/b")
    assert site.control.asked == [("explain", "a/b")]
    assert (exchange.status, exchange.json()["requests"]) == (200, [{"id": "a/b"}])


def test_why_is_a_404_if_nobody_remembers(site: Site) -> None:
    site.control.reply = wire.Reply(1, 200, b'{"requests": [], "silent_frontends": 1}')
    error = site.get("/explain/unknown").json()["error"]
    assert error["code"] == "unknown_request"
    assert "1024" in error["message"]
    assert "1 frontends could not be asked" in error["message"]


def test_without_the_scheduler_a_frontend_tells_what_it_knows_itself(site: Site) -> None:
    site.control.reply = None
    assert site.get("/explain/known").json()["requests"] == [{"id": "known"}]
    assert site.get("/explain/unknown").status == 404


def test_engines_learn_where_to_register(site: Site) -> None:
    directory = "ipc:///dev/shm/penstock-30000-0a1b2c3d"
    assert site.get("/endpoints").json() == {
        "protocol": wire.PROTOCOL,
        "run": "0a1b2c3d",
        "control": [f"{directory}/engines.sock", "tcp://router.example:30100"],
        "load": [f"{directory}/load.sock", "tcp://10.0.0.9:30101"],
    }


def test_models_are_merged_with_the_aliases_that_lead_somewhere(site: Site) -> None:
    listed = site.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["gpt", "tiny"]
    assert {model["object"] for model in listed["data"]} == {"model"}
    assert site.get("/v1/models/tiny").json() == listed["data"][1]
    assert site.get("/v1/models/org/other").status == 404


# -- health ------------------------------------------------------------------------------------------------------


def test_ready_needs_a_known_fleet_and_one_instance_but_no_scheduler(site: Site) -> None:
    assert site.get("/ready").status == 200
    site.frontend.run.writer.beat(1)
    away = site.get("/ready")
    assert (away.status, away.json()["scheduler"]["state"]) == (200, "away")
    for slot in site.frontend.slots.values():
        site.frontend.run.writer.set_state(slot, State.DRAINING)
    exchange = site.get("/ready")
    assert (exchange.status, exchange.headers["retry-after"]) == (503, "1")
    assert exchange.json()["reasons"] == ["no mixed instance is ready"]


def test_not_ready_before_the_configured_instances_were_asked(tmp_path: Path) -> None:
    with Frontend(tmp_path) as frontend:
        site = Site(frontend, tmp_path)
        assert site.get("/health").status == 200
        assert site.get("/ready").status == 503


# -- metrics -----------------------------------------------------------------------------------------------------


def samples(site: Site) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    exchange = site.get("/metrics")
    assert exchange.headers["content-type"] == CONTENT_TYPE
    families = list(text_string_to_metric_families(exchange.body.decode()))
    assert len({family.name for family in families}) == len(families)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(found: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_metrics_count_what_happened(site: Site) -> None:
    frontend = site.frontend
    for status in (200, 200, 429):
        frontend.begin(sink=Client())
        frontend.http.last.answer(b"x", status=status)
    forward = frontend.begin(sink=Client())
    forward.cancel()
    frontend.begin(sink=Client())
    frontend.http.last.sink.start(200, [])
    frontend.http.last.sink.write(b"x")
    frontend.http.last.sink.fail(UpstreamBroken("x"))
    frontend.begin(sink=Client())
    site.post("/v1/completions", b"bad")
    found = samples(site)

    def answers(status: str) -> float:
        key = "inference_requests_total"
        workers = ({"mixed_worker": url, "prefill_worker": "", "decode_worker": ""} for url in (A, B))
        labels = [tuple(sorted({**w, "status_code": status}.items())) for w in workers]
        return sum(found.get((key, label), 0) for label in labels)

    assert (answers("200"), answers("429"), answers("499"), answers("502")) == (3, 1, 1, 0)
    both = [(name, sum(value(found, f"penstock_instance_{name}", instance=url) for url in (A, B))) for name in (
        "requests_total", "broken_requests_total", "gone_requests_total", "in_flight_requests")]  # fmt: skip
    assert [count for _, count in both] == [6, 1, 1, 1]
    classes = [value(found, "penstock_responses_total", **{"class": word}) for word in ("2xx", "3xx", "4xx", "5xx")]
    assert classes == [3, 0, 3, 0]
    assert value(found, "penstock_rejected_requests_total") == 1
    assert value(found, "penstock_time_to_first_byte_seconds_count") == 4
    assert value(found, "penstock_time_to_first_byte_seconds_bucket", le="+Inf") == 4
    assert value(found, "penstock_open_requests", frontend="0") == 1
    assert value(found, "penstock_frontends") == 1
    assert value(found, "penstock_scheduler_alive") == 1
    assert value(found, "penstock_instance_state", instance=A, role="mixed", state="ready") == 1
    assert ("penstock_instance_running_requests", (("instance", A),)) not in found  # unknown is not 0


def test_metrics_of_another_instance_in_the_slot_begin_at_nothing(site: Site) -> None:
    frontend, run = site.frontend, site.frontend.run
    run.writer.remove(frontend.slots[B], run.clock())
    run.writer.set_state(frontend.slots[A], State.READY)
    frontend.begin()
    frontend.http.last.answer(b"x")
    run.writer.remove(frontend.slots[A], run.clock())
    run.writer.reclaim(run.clock.advance(31))
    run.writer.reclaim(run.clock.advance(31))
    assert run.admit("http://10.0.0.9:80") in frontend.slots.values()
    found = samples(site)
    assert value(found, "penstock_instance_requests_total", instance="http://10.0.0.9:80") == 0
    assert frontend.counted(CounterColumn.STARTED) == 1


def test_a_frontends_death_lowers_no_counter_and_ends_what_it_had(site: Site) -> None:
    frontend = site.frontend
    frontend.begin()
    before = samples(site)
    frontend.run.roster.settle(0)
    after = samples(site)
    assert sum(v for (name, _), v in after.items() if name == "penstock_instance_abandoned_requests_total") == 1
    assert sum(v for (name, _), v in after.items() if name == "penstock_instance_in_flight_requests") == 0
    assert all(after[key] >= count for key, count in before.items() if key[0].endswith("_total"))
    assert value(after, "penstock_frontends") == 0
