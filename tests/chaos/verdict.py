"""What became of every request: the clients' ledgers beside those of the engines, and of the time of each blow."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from broker.worker.sim.text import Words, prompt_of
from tests.chaos.blows import Blow, Kind
from tests.chaos.load import Asked, Load
from tests.support.client import Exchange, State

SLACK_S = 3.0
"""A connection may break this long after its frontend was killed: the machine is busy."""
SURE_S = 1.5
"""Two requests of one client have begun to wait, or been granted, in a known order when that far apart: in between lie
a connection and a frontend's turn, of which a busy machine may make a second."""
AGAIN_S = 4.0
"""After a scheduler is there again, until all that wait are in its line."""


UNRULY = (Kind.HOST, Kind.SCHEDULER, Kind.FROZEN_SCHEDULER)
"""Without a scheduler each frontend serves its own in order."""


class Run(NamedTuple):
    """One request at one engine, by the engine's ledger."""

    engine: str
    state: str
    tokens: int
    bytes: int


@dataclass
class Verdict:
    requests: int = 0
    answered: int = 0
    left: int = 0
    """Their clients went before the answer was whole."""
    stolen: int = 0
    """Answered by an engine of another host."""
    waited: int = 0
    broken: int = 0
    """Connections of processes that were killed."""
    errors: Counter[str] = field(default_factory=Counter)
    """Explicit ones, by status or event and code."""
    ran_again: int = 0
    """Requests that reached a second engine, before the first one had answered a byte."""
    compared: int = 0
    """Pairs of neighbours in a line whose order was compared."""
    failures: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        errors = ", ".join(f"{count} x {what}" for what, count in sorted(self.errors.items())) or "none"
        return [
            f"{self.requests} requests: {self.answered} answered ({self.waited} had waited, {self.stolen} ran at "
            f"another host), {self.left} left, {self.broken} broken with their process",
            f"explicit errors: {errors}",
            f"sent to a second engine: {self.ran_again}; order compared in {self.compared} pairs",
            *(f"FAILED: {failure}" for failure in self.failures[:20]),
            *([f"... and {len(self.failures) - 20} more"] if len(self.failures) > 20 else []),
        ]


def judge(load: Load, runs: Mapping[str, Sequence[Run]], blows: Sequence[Blow]) -> Verdict:
    """`runs`: what the engines did, by the request's name."""
    verdict = Verdict()
    by_name: dict[str, list[Exchange]] = defaultdict(list)
    for host, client in enumerate(load.clients):
        mine = [blow for blow in blows if blow.host == host]
        for exchange in client.ledger.values():
            asked = load.asked[exchange.id]
            by_name[asked.name].append(exchange)
            _one(verdict, exchange, asked, host, mine)
        _order(verdict, list(client.ledger.values()), load.asked, blows, host)
    for name in by_name.keys() | runs.keys():
        _compare(verdict, name, by_name.get(name, []), runs.get(name, []))
    return verdict


def _one(verdict: Verdict, exchange: Exchange, asked: Asked, host: int, blows: Sequence[Blow]) -> None:
    """By itself: how it ended, and that what it was told is what it asked for."""
    verdict.requests += 1
    hit = any(
        blow.kind in (Kind.HOST, Kind.FRONTEND)
        and exchange.sent_at <= blow.over + SLACK_S
        and blow.at <= exchange.ended_at
        for blow in blows
    )
    if exchange.whole:
        verdict.answered += 1
        verdict.waited += "x-penstock-queue-ms" in exchange.headers
        engine = exchange.fingerprint()
        verdict.stolen += not engine.startswith(f"h{host}")
        if exchange.text() != Words(prompt_of("chat", asked.body).digest, engine).text(asked.words):
            verdict.failures.append(f"{exchange} was told something else than {engine} says to its prompt")
    elif exchange.state is State.OPEN:
        verdict.failures.append(f"{exchange} has not ended")
    elif exchange.state is State.LEFT:
        verdict.left += 1
    elif exchange.state is State.BROKEN:
        verdict.broken += 1
        if not hit:
            verdict.failures.append(f"{exchange} broke, and nothing was killed at its host")
    elif (error := exchange.error()) is None:
        verdict.failures.append(f"{exchange} ended without an answer and without an error")
    else:
        where = "event" if exchange.status == 200 else exchange.status
        verdict.errors[f"{where} {error.get('code')}"] += 1
        if not hit:
            verdict.failures.append(f"{exchange} failed, and nothing was killed at its host: {error}")


def _compare(verdict: Verdict, name: str, exchanges: Sequence[Exchange], runs: Sequence[Run]) -> None:
    """The requests of one name, nearly always one, with what engines have by that name."""
    finished = Counter((run.engine, run.bytes) for run in runs if run.state == "finished")
    told = Counter((each.fingerprint(), len(each.body)) for each in exchanges if each.whole)
    if told - finished:
        verdict.failures.append(f"{name}: clients were told {told - finished}, engines say {runs}")
    if finished.total() > len(exchanges):
        verdict.failures.append(f"{name} was answered more often than asked: {exchanges}, engines say {runs}")
    if any(run.state == "open" for run in runs):
        verdict.failures.append(f"{name} still runs: {runs}")
    verdict.ran_again += max(0, len(runs) - len(exchanges))


def _order(
    verdict: Verdict, exchanges: Sequence[Exchange], asked: Mapping[str, Asked], blows: Sequence[Blow], host: int
) -> None:
    """First come, first served, among those of one priority at one host that prefer one instance.

    While a host has no scheduler each of its frontends serves its own in order; the two are not compared then.
    """
    unruly = [blow for blow in blows if blow.host == host and blow.kind in UNRULY]
    lines: dict[tuple[str, str], list[Exchange]] = defaultdict(list)
    for exchange in exchanges:
        said = decision(exchange)
        if not exchange.whole or said.get("tries") != "1" or said.get("queue_ms", "-") == "-":
            continue
        if any(blow.at <= granted_at(exchange) and exchange.sent_at <= blow.over + AGAIN_S for blow in unruly):
            continue
        home = said["stolen_from"] if said["stolen_from"] != "-" else said["instance"]
        lines[asked[exchange.id].priority, home].append(exchange)
    for line in lines.values():
        latest: Exchange | None = None  # of those that came before: the one that was granted last
        for exchange in sorted(line, key=_sent):
            if latest is not None:
                verdict.compared += 1
                came, granted = exchange.sent_at - latest.sent_at, granted_at(latest) - granted_at(exchange)
                if came > SURE_S and granted > SURE_S:
                    verdict.failures.append(
                        f"{exchange.id} passed {latest.id}: it came {came:.2f} s later and was granted {granted:.2f} s "
                        f"earlier, {_after(exchange, blows)}; {decision(exchange)}, {decision(latest)}"
                    )
            if latest is None or granted_at(exchange) > granted_at(latest):
                latest = exchange


def decision(exchange: Exchange) -> dict[str, str]:
    """`X-Penstock-Decision`."""
    words = exchange.headers.get("x-penstock-decision", "").split()
    return dict(word.split("=", 1) for word in words)


def granted_at(exchange: Exchange) -> float:
    return exchange.sent_at + float(decision(exchange)["queue_ms"]) / 1e3


def _after(exchange: Exchange, blows: Sequence[Blow]) -> str:
    """What was killed before it was granted."""
    before = [
        f"{granted_at(exchange) - blow.at:.1f} s after {blow}" for blow in blows if blow.at <= granted_at(exchange)
    ]
    return ", ".join(before[-2:])


def _sent(exchange: Exchange) -> float:
    return exchange.sent_at
