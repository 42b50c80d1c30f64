"""That the verdict over a run of chaos sees what it is there to see: each kind of damage, alone, in a made-up run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from broker.worker.sim.text import Words, prompt_of
from tests.chaos.blows import Blow, Kind
from tests.chaos.load import Asked
from tests.chaos.verdict import SLACK_S, Run, Verdict, judge
from tests.support.client import State, chat

WORDS = 5
ENGINE = "h0e0"


def asked(name: str, priority: str = "normal") -> Asked:
    return Asked(name, priority, chat(f"Chaos {name}"), WORDS)


def answer(to: Asked, engine: str = ENGINE) -> str:
    return Words(prompt_of("chat", to.body).digest, engine).text(WORDS)


@dataclass
class Told:
    """An exchange, as far as the verdict looks at it."""

    id: str
    said: str = ""
    engine: str = ENGINE
    state: State = State.FINISHED
    status: int = 200
    failure: dict[str, Any] | None = None
    sent_at: float = 10.0
    ended_at: float = 12.0
    queue_s: float | None = None
    stolen_from: str = "-"
    tries: int = 1
    done: bool = True
    body: bytes = b"0123456789"
    headers: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        queue_ms = "-" if self.queue_s is None else f"{self.queue_s * 1e3:.1f}"
        self.headers = {
            "x-penstock-decision": f"instance={self.engine} queue_ms={queue_ms} stolen_from={self.stolen_from} "
            f"tries={self.tries}"
        }

    @property
    def whole(self) -> bool:
        return self.state is State.FINISHED and self.status == 200 and self.failure is None and self.done

    def fingerprint(self) -> str:
        return self.engine if self.status == 200 else ""

    def text(self) -> str:
        return self.said

    def error(self) -> dict[str, Any] | None:
        return self.failure


class Case:
    """A run with one host; `ask` adds a request that was answered as it should be, but for what is said otherwise."""

    def __init__(self) -> None:
        self.asked: dict[str, Asked] = {}
        self.ledger: dict[str, Told] = {}
        self.runs: dict[str, list[Run]] = {}
        self.blows: list[Blow] = []

    def ask(
        self, id: str, *, name: str = "", priority: str = "normal", runs: Sequence[Run] | None = None, **told: Any
    ) -> Told:
        to = self.asked[id] = asked(name or id, priority)
        exchange = self.ledger[id] = Told(id, **{"said": answer(to, told.get("engine", ENGINE)), **told})
        mine = [Run(exchange.engine, "finished", WORDS, len(exchange.body))] if runs is None else runs
        self.runs.setdefault(to.name, []).extend(mine)
        return exchange

    def blow(self, kind: Kind, at: float, over: float) -> None:
        self.blows.append(Blow(kind, 0, at, 30, over))

    def judge(self) -> Verdict:
        load: Any = SimpleNamespace(clients=[SimpleNamespace(ledger=self.ledger)], asked=self.asked)
        return judge(load, self.runs, self.blows)

    def failure(self) -> str:
        (found,) = self.judge().failures
        return found


@pytest.fixture
def case() -> Case:
    return Case()


def test_answered_requests_are_fine(case: Case) -> None:
    case.ask("a")
    case.ask("b", engine="h1e0", queue_s=1.0, stolen_from=ENGINE)
    verdict = case.judge()
    assert verdict.failures == []
    assert (verdict.requests, verdict.answered, verdict.stolen) == (2, 2, 1)


def test_a_request_that_never_ends_is_a_failure(case: Case) -> None:
    case.ask("a", state=State.OPEN, runs=[])
    assert "has not ended" in case.failure()


def test_an_answer_that_stops_without_an_error_is_a_failure(case: Case) -> None:
    case.ask("a", done=False)
    assert "without an error" in case.failure()


def test_an_answer_to_another_prompt_is_a_failure(case: Case) -> None:
    case.ask("a", said=answer(asked("b")))
    assert "something else" in case.failure()


def test_an_answer_that_is_cut_or_doubled_is_a_failure(case: Case) -> None:
    case.ask("a", runs=[Run(ENGINE, "finished", WORDS, 11)])
    assert "clients were told" in case.failure()


def test_an_answer_by_two_engines_is_a_failure(case: Case) -> None:
    case.ask("a", runs=[Run(ENGINE, "finished", WORDS, 10), Run("h1e0", "finished", WORDS, 10)])
    assert "more often than asked" in case.failure()


def test_a_second_engine_is_no_failure_when_only_one_answered(case: Case) -> None:
    case.ask("a", runs=[Run("h1e0", "aborted", 0, 0), Run(ENGINE, "finished", WORDS, 10)])
    verdict = case.judge()
    assert verdict.failures == []
    assert verdict.ran_again == 1


def test_a_request_that_an_engine_still_runs_is_a_failure(case: Case) -> None:
    case.ask("a", state=State.LEFT, runs=[Run(ENGINE, "open", 2, 4)])
    assert "still runs" in case.failure()


def test_twins_are_told_apart_by_their_prompts(case: Case) -> None:
    one, other = case.ask("a", name="twin"), case.ask("b", name="twin")
    for exchange in (one, other):
        case.asked[exchange.id] = Asked("twin", "normal", chat(exchange.id), WORDS)
        exchange.said = answer(case.asked[exchange.id])
    assert case.judge().failures == []
    one.said, other.said = other.said, one.said
    assert len(case.judge().failures) == 2


@pytest.mark.parametrize(
    ("sent", "ended", "excused"), [(4.0, 6.0, True), (1.0, 4.9, False), (6.1 + SLACK_S, 11.0, False)]
)
def test_a_connection_may_break_only_with_its_process(case: Case, sent: float, ended: float, excused: bool) -> None:
    case.blow(Kind.FRONTEND, 5.0, 6.0)
    case.ask("a", state=State.BROKEN, sent_at=sent, ended_at=ended, runs=[])
    verdict = case.judge()
    assert verdict.broken == 1
    assert (verdict.failures == []) is excused


@pytest.mark.parametrize(("kind", "excused"), [(Kind.HOST, True), (Kind.SCHEDULER, False), (Kind.REDIS, False)])
def test_an_error_is_excused_by_the_death_of_the_own_host_alone(case: Case, kind: Kind, excused: bool) -> None:
    case.blow(kind, 11.0, 13.0)
    case.ask("a", status=503, failure={"code": "no_instance"}, runs=[])
    verdict = case.judge()
    assert verdict.errors == {"503 no_instance": 1}
    assert (verdict.failures == []) is excused


def test_one_that_passes_another_of_its_line_is_a_failure(case: Case) -> None:
    case.ask("a", sent_at=10.0, queue_s=5.0)
    case.ask("b", sent_at=12.0, queue_s=1.0)
    assert "b passed a" in case.failure()


@pytest.mark.parametrize(
    "later",
    [
        {"sent_at": 12.0, "queue_s": 3.5},  # granted after
        {"sent_at": 10.2, "queue_s": 1.0},  # came at about the same time
        {"sent_at": 12.0, "queue_s": 1.0, "priority": "high"},
        {"sent_at": 12.0, "queue_s": 1.0, "engine": "h0e1"},  # of another line
        {"sent_at": 12.0, "queue_s": 1.0, "tries": 2},  # its first try is not known
        {"sent_at": 12.0},  # did not wait
    ],
)
def test_whoever_is_not_behind_in_the_same_line_passes_nobody(case: Case, later: dict[str, Any]) -> None:
    case.ask("a", sent_at=10.0, queue_s=5.0)
    case.ask("b", **later)
    assert case.judge().failures == []


def test_a_stolen_request_stands_in_the_line_of_its_home(case: Case) -> None:
    case.ask("a", sent_at=10.0, queue_s=5.0)
    case.ask("b", sent_at=12.0, queue_s=1.0, engine="h1e0", stolen_from=ENGINE)
    assert "b passed a" in case.failure()


def test_the_order_of_different_frontends_is_not_compared_without_a_scheduler(case: Case) -> None:
    case.blow(Kind.SCHEDULER, 11.0, 12.0)
    case.ask("a", sent_at=10.0, queue_s=5.0)
    case.ask("b", sent_at=12.0, queue_s=1.0)
    verdict = case.judge()
    assert verdict.failures == []
    assert verdict.compared == 0
