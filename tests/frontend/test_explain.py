"""What a frontend remembers of its decisions, and what it tells of them: the header, and the long form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker import explanation, wire
from broker.config import Scheduler, Server
from broker.errors import ConnectFailed
from broker.faces import FD_ROUTER
from broker.route import RouteRequest
from broker.types import EngineKind, Instance, LoadReport
from frontend.explain import DECISION, SHOWN, Explainer
from frontend.forward import Forward
from frontend.forwarder import Forwarder
from frontend.upstream.base import Headers, UpstreamRequest
from tests.frontend.fakes import Client, Frontend
from tests.frontend.pairs import PairFrontend
from tests.frontend.test_placing import A, B, Scene, other

PROMPT = "word" * 64
UNSENT = UpstreamRequest(path="/v1/completions", headers=[], body=b"{}")


class Listening(Client):
    """Keeps the headers, too."""

    def __init__(self) -> None:
        super().__init__()
        self.headers: dict[bytes, bytes] = {}

    def start(self, status: int, headers: Headers) -> None:
        super().start(status, headers)
        self.headers = dict(headers)

    @property
    def decision(self) -> dict[str, str]:
        words = (word.partition("=") for word in self.headers[DECISION].decode().split(" "))
        return {key: value for key, _, value in words}


def ask(
    forwarder: Forwarder, ident: str = "id-1", name: str = "", prompt: str = PROMPT, *, why: bool = True
) -> tuple[Forward, Listening]:
    client = Listening()
    route = RouteRequest(model="tiny", prompt=prompt, prompt_tokens=len(prompt) // 4)
    request = UpstreamRequest(path="/v1/completions?x=1", headers=[], body=b"{}", request_id=name)
    forward = forwarder.forward(ident.encode(), route, request, client, asks_why=why)
    forward.begin()
    return forward, client


def explainer(frontend: Frontend, forwarder: Forwarder | None = None) -> Explainer:
    it = forwarder or frontend.forwarder
    return Explainer(3, frontend.run.reader, it.policies, it.decisions, it.under_way, it.clock)


def plain(path: Path, *urls: str, **sections: Any) -> Frontend:
    return Frontend(path, *(urls or (A, B)), **{"scheduler": Scheduler(policy="request_num"), **sections})


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    it = Scene(tmp_path, "prefix_cost")
    yield it
    it.frontend.close()


# -- the header --------------------------------------------------------------------------------------------


def test_who_asks_is_told_in_a_header_and_nobody_else(tmp_path: Path) -> None:
    with plain(tmp_path) as frontend:
        asked, silent = (ask(frontend.forwarder, why=why)[1] for why in (True, False))
        for call in frontend.http.calls:
            call.answer(b"done")
        assert asked.decision == {
            "instance": frontend.http.calls[0].instance.url,
            "policy": "request_num",
            "candidates": "2",
            "load": "0",
            "load_age_ms": "0.0",
            "blocks": "-",
            "queue_ms": "-",
            "stolen_from": "-",
            "rescued_from": "-",
            "tries": "1",
        }
        assert DECISION not in silent.headers


def test_who_asks_is_told_where_it_failed_too(tmp_path: Path) -> None:
    with plain(tmp_path) as frontend:
        asked, silent = (ask(frontend.forwarder, why=why)[1] for why in (True, False))
        error, calls = ConnectFailed("refused"), 0
        while calls < len(frontend.http.calls):  # the same error for all: retries, and the other request
            frontend.http.calls[calls].sink.fail(error)
            calls += 1
        (failed,), (plainly,) = asked.heard, silent.heard
        assert isinstance(failed, ConnectFailed)
        assert dict(failed.headers)[DECISION].endswith(b" tries=3")
        assert plainly.headers == ()
        frontend.forwarder.forward(b"lost", RouteRequest(model="unheard-of"), UNSENT, asked, asks_why=True).begin()
        assert asked.heard[-1].headers == ()  # it was nowhere


@pytest.mark.parametrize(("setting", "told"), [("never", [False, False]), ("always", [True, True])])
def test_the_settings_say_whether_there_is_a_header(tmp_path: Path, setting: Any, told: list[bool]) -> None:
    with plain(tmp_path, server=Server(decision_header=setting, decisions=0)) as frontend:
        clients = [ask(frontend.forwarder, why=why)[1] for why in (True, False)]
        for call in frontend.http.calls:
            call.answer(b"done")
        assert [DECISION in client.headers for client in clients] == told


def test_the_other_face_says_nothing_and_remembers_nothing(tmp_path: Path) -> None:
    with plain(tmp_path, server=Server(compat=FD_ROUTER.name, decision_header="always")) as frontend:
        _, client = ask(frontend.forwarder)
        frontend.http.last.answer(b"done")
        assert DECISION not in client.headers
        assert explainer(frontend).explain("id-1") == []


def test_a_choice_by_reports_says_how_old_they_were(tmp_path: Path) -> None:
    with plain(tmp_path, scheduler=Scheduler(policy="fd_remote_metrics_score")) as frontend:
        for url, running in ((A, 4), (B, 9)):
            frontend.run.writer.report(
                frontend.slots[url], LoadReport(running=running, waiting=1), frontend.run.clock()
            )
        frontend.run.clock.advance(0.25)
        _, client = ask(frontend.forwarder)
        frontend.http.last.answer(b"done")
        assert (client.decision["instance"], client.decision["load_age_ms"]) == (A, "250.0")
        (told,) = explainer(frontend).explain("id-1")
        shown = {each["instance"]: each for each in told["steps"][0]["nearest"]}
        assert [shown[url]["running"] for url in (A, B)] == [4, 9]
        assert [shown[url]["report_age_ms"] for url in (A, B)] == [250.0, 250.0]


def test_a_stolen_request_says_from_where_and_how_long_it_waited(scene: Scene) -> None:
    first, _ = ask(scene.forwarder, "first")
    home = scene.frontend.http.last.instance.url
    held, _ = ask(scene.forwarder, "held", prompt="another")
    _, client = ask(scene.forwarder)
    ticket = scene.ticket()
    held.cancel()
    scene.frontend.time.advance(0.5)
    scene.grant(ticket, other(home))
    scene.frontend.http.last.answer(b"done")
    decision = client.decision
    assert decision["instance"] == other(home)
    assert decision["stolen_from"] == home
    assert float(decision["queue_ms"]) >= 0
    assert float(decision["load_age_ms"]) == 500.0  # the policy looked when the request came
    assert decision["blocks"] == "0/4"
    assert decision["load"] == "1"
    first.cancel()


def test_a_rescued_request_says_from_where(scene: Scene) -> None:
    forward, client = ask(scene.forwarder)
    full = scene.frontend.http.last.instance.url
    choice = scene.admission.claim(RouteRequest(model="tiny"), scene.frontend.slots[other(full)], 1)
    assert choice is not None
    forward.rescue(choice)
    scene.frontend.http.last.answer(b"done")
    assert client.decision["rescued_from"] == full
    assert client.decision["instance"] == other(full)
    assert client.decision["tries"] == "2"


def test_of_a_pair_both_choices_are_told(tmp_path: Path) -> None:
    frontend = PairFrontend(tmp_path, EngineKind.FASTDEPLOY, scheduler=Scheduler(prefill_policy="process_tokens"))
    client = Listening()
    route = RouteRequest(model="tiny", prompt_tokens=10)
    request = UpstreamRequest(path="/v1/completions", headers=[], body=b'{"prompt": "x"}', stream=True, request_id="r")
    frontend.forwarder.forward(b"id-1", route, request, client, asks_why=True).begin()
    frontend.decode.answer(b"done")
    said = client.headers[DECISION].decode()
    assert said.startswith(f"prefill={frontend.prefill.instance.url} policy=process_tokens candidates=2 ")
    assert f" decode={frontend.decode.instance.url} policy=request_num candidates=2 load=0 " in said
    (told,) = explainer(frontend).explain("r")
    (step,) = told["steps"]
    assert [leg["role"] for leg in step["legs"]] == ["prefill", "decode"]
    assert told["request_id"] == "r"
    assert list(explanation.told({"requests": [told], "silent_frontends": 0}))[2].endswith("to 2 instances at once")
    frontend.close()


def test_an_instance_of_another_host_is_told_with_its_host(scene: Scene) -> None:
    scene.fill()
    _, client = ask(scene.forwarder, "lent")
    ticket = scene.ticket()
    instance = msgspec.msgpack.encode(Instance(url="http://10.9.9.9:80"))
    grant = wire.RemoteGrant(ticket.number, wire.RemoteLease("lease", "id-of-b"), "host-b", instance, ticket.home)
    scene.admission.hear(wire.Grants(remote=[grant]))
    scene.frontend.http.last.answer(b"done")
    assert client.decision["instance"] == "http://10.9.9.9:80@host-b"
    assert client.decision["stolen_from"] == scene.url(ticket.home)
    assert client.decision["load"] == "-"
    (told,) = explainer(scene.frontend, scene.forwarder).explain("lent")
    assert told["steps"][-1]["instance"] == told["instance"] == "http://10.9.9.9:80@host-b"


def test_what_would_end_the_header_is_not_in_it(tmp_path: Path) -> None:
    with plain(tmp_path, "http://a\r\nx-evil: 1") as frontend:
        _, client = ask(frontend.forwarder)
        frontend.http.last.answer(b"done")
        assert client.headers[DECISION].startswith(b"instance=http://a??x-evil: 1 policy=")


# -- what is remembered ------------------------------------------------------------------------------------


def test_a_request_can_be_asked_for_by_every_name_it_has(tmp_path: Path) -> None:
    with plain(tmp_path) as frontend:
        ask(frontend.forwarder, "from-the-client", "cmpl-from-us", why=False)
        ask(frontend.forwarder, "another", why=False)
        for asked in ("from-the-client", "cmpl-from-us", "chatcmpl-from-the-client"):
            (told,) = explainer(frontend).explain(asked)
            assert (told["id"], told["request_id"], told["frontend"]) == ("from-the-client", "cmpl-from-us", 3)
        assert explainer(frontend).explain("nobody") == []


def test_it_is_known_while_it_is_under_way_and_after(tmp_path: Path) -> None:
    with plain(tmp_path) as frontend:
        ask(frontend.forwarder, why=False)
        (told,) = explainer(frontend).explain("id-1")
        assert (told["outcome"], told["status"], told["first_byte_ms"]) == ("under way", None, None)
        frontend.time.advance(0.25)
        frontend.http.last.answer(b"done")
        (told,) = explainer(frontend).explain("id-1")
        assert (told["outcome"], told["status"], told["first_byte_ms"]) == ("done", 200, 250.0)
        assert told["path"] == "/v1/completions"
        assert told["instance"] == frontend.http.last.instance.url


def test_a_failed_attempt_is_told_with_its_reason_and_whom_it_left_out(tmp_path: Path) -> None:
    with plain(tmp_path) as frontend:
        ask(frontend.forwarder, why=False)
        first = frontend.http.last
        first.sink.fail(ConnectFailed("refused"))
        second = frontend.http.last
        second.sink.fail(ConnectFailed("refused again"))
        (told,) = explainer(frontend).explain("id-1")
        sent, failed, again, *_ = told["steps"]
        assert (sent["step"], sent["instance"]) == ("sent", first.instance.url)
        assert (failed["step"], failed["instance"], failed["reason"]) == ("failed", first.instance.url, "refused")
        assert (again["instance"], again["left_out"]) == (second.instance.url, [first.instance.url])
        assert [step["step"] for step in told["steps"]] == ["sent", "failed", "sent", "failed", "sent"]
        assert told["tries"] == 3


def test_what_decided_is_told_for_each_candidate(scene: Scene) -> None:
    ask(scene.forwarder)
    home = scene.frontend.http.last.instance.url
    scene.frontend.http.last.answer(b"done")
    ask(scene.forwarder, "again", prompt=PROMPT + "more")
    (told,) = explainer(scene.frontend, scene.forwarder).explain("again")
    (step,) = told["steps"]
    assert (step["policy"], step["candidates"], step["blocks"]) == ("prefix_cost", 2, 4.1)
    shown = {each["instance"]: each for each in step["nearest"]}
    assert (shown[home]["blocks"], shown[other(home)]["blocks"]) == (4, 0)
    assert shown[home]["score"] < shown[other(home)]["score"]
    assert [each["chosen"] for each in (shown[home], shown[other(home)])] == [True, False]


def test_a_request_that_waits_and_one_that_nobody_serves_are_told_too(scene: Scene) -> None:
    scene.fill()
    ask(scene.forwarder, "waits")
    (told,) = explainer(scene.frontend, scene.forwarder).explain("waits")
    assert [step["step"] for step in told["steps"]] == ["queued"]
    assert told["instance"] is None
    assert told["steps"][0]["home"] in (A, B)
    route = RouteRequest(model="unheard-of")
    request = UpstreamRequest(path="/v1/completions", headers=[], body=b"{}")
    scene.forwarder.forward(b"lost", route, request, Client()).begin()
    (told,) = explainer(scene.frontend, scene.forwarder).explain("lost")
    assert (told["outcome"], told["status"]) == ("failed", 404)
    assert told["steps"][-1]["reason"] == "The model `unheard-of` does not exist"


def test_a_flood_of_smooth_requests_does_not_wash_away_what_was_notable(tmp_path: Path) -> None:
    with plain(tmp_path, server=Server(decisions=4)) as frontend:
        ask(frontend.forwarder, "failed", why=False)
        frontend.http.last.answer(b"no", status=400)
        ask(frontend.forwarder, "asked")
        frontend.http.last.answer(b"done")
        for number in range(20):
            ask(frontend.forwarder, f"smooth-{number}", why=False)
            frontend.http.last.answer(b"done")
        known = explainer(frontend)
        assert [len(known.explain(name)) for name in ("failed", "asked", "smooth-19", "smooth-16")] == [1, 1, 1, 1]
        assert known.explain("smooth-15") == []
        assert frontend.forwarder.decisions is not None
        assert len(frontend.forwarder.decisions) == 6


def test_neither_prompt_nor_answer_is_remembered(tmp_path: Path) -> None:
    with plain(tmp_path, scheduler=Scheduler(policy="prefix_cost")) as frontend:
        ask(frontend.forwarder, prompt="secret prompt " * 40)
        frontend.http.last.answer(b"secret answer")
        assert b"secret" not in b"".join(explainer(frontend).messages("id-1"))
        record = next(iter(frontend.forwarder.decisions.find({"id-1"})))  # type: ignore[union-attr]  # by default
        assert "secret" not in repr(record)


@pytest.mark.parametrize("status", [200, 400])
def test_of_a_long_target_the_beginning_is_remembered(tmp_path: Path, status: int) -> None:
    with plain(tmp_path) as frontend:
        for path in ("/v1/" + "p" * 64_000, "/v1/completions?" + "q" * 64_000):
            request = UpstreamRequest(path=path, headers=[], body=b"{}")
            frontend.forwarder.forward(b"id-1", RouteRequest(), request, Client()).begin()
            assert frontend.http.last.request.path == path
            frontend.http.last.answer(b"done", status=status)
        kept = [record.path for record in frontend.forwarder.decisions.find({"id-1"})]  # type: ignore[union-attr]  # by default
        assert kept == ["/v1/completions?" + "q" * 240 + "…", "/v1/" + "p" * 252 + "…"]
        assert [told["path"] for told in explainer(frontend).explain("id-1")] == ["/v1/completions", kept[1]]


def test_however_large_the_fleet_an_answer_fits_its_message(tmp_path: Path) -> None:
    urls = [f"http://{'n' * 200}-{n:03d}:80" for n in range(2 * SHOWN)]
    with plain(tmp_path, *urls, slots=len(urls)) as frontend:
        ask(frontend.forwarder, why=False)
        (told,) = explainer(frontend).explain("id-1")
        (step,) = told["steps"]
        assert step["candidates"] == 2 * SHOWN
        assert len(step["nearest"]) == SHOWN
        assert [each["chosen"] for each in step["nearest"]].count(True) == 1
        for _ in range(2):
            frontend.http.last.sink.fail(ConnectFailed("x" * 20_000))
        (message,) = explainer(frontend).messages("id-1")
        assert len(message) < wire.MAX_CONTROL_BYTES


def test_an_instance_that_is_gone_is_named_by_its_slot(tmp_path: Path) -> None:
    with plain(tmp_path) as frontend:
        ask(frontend.forwarder, why=False)
        for url in (A, B):
            frontend.run.writer.remove(frontend.slots[url], frontend.run.clock())
        (told,) = explainer(frontend).explain("id-1")
        assert [each["instance"] for each in told["steps"][0]["nearest"]] == ["slot 0, gone", "slot 1, gone"]
        assert told["instance"] in (A, B)


def test_nothing_is_kept_where_nothing_is_to_be_kept(tmp_path: Path) -> None:
    with plain(tmp_path, server=Server(decisions=0)) as frontend:
        ask(frontend.forwarder, why=False)
        assert frontend.forwarder.decisions is None
        (told,) = explainer(frontend).explain("id-1")  # it is under way: what it is made of is there anyway
        assert told["steps"][0]["instance"] == frontend.http.last.instance.url
        frontend.http.last.answer(b"done")
        assert explainer(frontend).explain("id-1") == []
