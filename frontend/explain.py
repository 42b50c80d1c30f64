"""Why a request went where it went: in a line for its client, and at length for whoever asks afterwards.

Nothing here is on the way of a request whose client did not ask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain, islice
from typing import Any, NamedTuple

import msgspec
import numpy as np

from broker import wire
from broker.aborting import names
from broker.policies.base import Numbers, Vector
from broker.types import Role
from broker.vectors import Seen
from broker.view import TableReader
from frontend.decisions import Decisions, Failed, Granted, Queued, Record, Rescued, Sent, Step
from frontend.dispatch import Choice, Considered

DECISION = b"x-penstock-decision"
"""Header of an answer: the line."""
SHOWN = 32
"""Candidates told of one choice: the instance chosen and those that came nearest."""
MOST_BYTES = wire.MAX_CONTROL_BYTES - 64
TOLD = 4
"""Requests of one name that are told."""

_UNPRINTABLE = re.compile(rb"[^ -~]")
"""URLs come from registrations, and from other hosts: what would end the header must not be in it."""

Policies = Mapping[Role, str]
"""Names, by role."""
Json = dict[str, Any]


class Way(NamedTuple):
    """What became of a request up to its last attempt."""

    tries: int
    waited_s: float | None
    stolen_from: str | None
    rescued_from: str | None
    considered: Mapping[Role, tuple[Considered, float]]
    """By the last choice that the role's policy made, and when."""


def way(steps: Sequence[Step]) -> Way:
    tries, waited_s = 0, None
    stolen_from: str | None = None
    rescued_from: str | None = None
    home: str | None = None
    considered: dict[Role, tuple[Considered, float]] = {}
    for step in steps:
        match step:
            case Queued():
                if step.considered is not None:
                    considered[step.considered.role] = step.considered, step.at
            case Granted():
                waited_s, home = step.waited_s, step.home
            case Rescued():
                rescued_from = step.where
            case Sent():
                tries += 1
                if home not in (None, step.chosen.instance.url):
                    stolen_from = home
                home = None
                fresh = [leg.considered for leg in step.chosen.legs if leg.considered is not None]
                considered |= {each.role: (each, step.at) for each in fresh}
            case Failed():
                pass
    return Way(tries, waited_s, stolen_from, rescued_from, considered)


# -- the line ----------------------------------------------------------------------------------------------


def line(steps: Sequence[Step], policies: Policies) -> bytes:
    """Of a request that has been sent: its last attempt, and how it came there. `-` is nothing, or not known."""
    found = way(steps)
    sent = next(step for step in reversed(steps) if isinstance(step, Sent))
    words = []
    legs = sent.chosen.legs
    for leg in legs:
        considered, at = found.considered.get(leg.instance.role, (None, 0.0))
        numbers = _Numbers(considered, leg.lease.slot) if considered is not None else None
        age_s = sent.at - at
        words += [
            f"instance={sent.chosen.where}"
            if len(legs) == 1
            else f"{leg.instance.role.name.lower()}={leg.instance.url}",
            f"policy={policies[leg.instance.role]}",
            f"candidates={numbers.count if numbers else '-'}",
            f"load={_dash(numbers.load) if numbers else '-'}",
            f"load_age_ms={_ms(age_s + numbers.age_s) if numbers and numbers.age_s is not None else '-'}",
            f"blocks={numbers.blocks if numbers else '-'}",
        ]
    words += [
        f"queue_ms={_ms(found.waited_s)}",
        f"stolen_from={_dash(found.stolen_from)}",
        f"rescued_from={_dash(found.rescued_from)}",
        f"tries={found.tries}",
    ]
    return _UNPRINTABLE.sub(b"?", " ".join(words).encode("ascii", "replace"))


class _Numbers:
    """What a choice saw of one slot."""

    def __init__(self, considered: Considered, slot: int) -> None:
        seen, why = considered.view.seen, considered.why
        self.count = len(seen.slots)
        places = np.flatnonzero(seen.slots == slot)
        place = int(places[0]) if len(places) else None
        self.load = _at(seen.in_flight, place)
        """Requests."""
        reported_ns = _at(seen.reported_ns, place)
        self.age_s = None if self.load is None and reported_ns is None else 0.0  # live counters are of this moment
        if reported_ns:
            self.age_s = (seen.now_ns - reported_ns) / 1e9
        depth = _at(why.depths, place) if why is not None else None
        self.blocks = "-" if why is None or depth is None else f"{depth}/{why.blocks:.0f}"


def _at(numbers: Sequence[int] | Vector | None, place: int | None) -> int | None:
    return None if numbers is None or place is None else int(numbers[place])


def _dash(value: object) -> str:
    return "-" if value is None else str(value)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


# -- at length ---------------------------------------------------------------------------------------------


class Explainer:
    """Tells what one frontend knows of requests. Owns nothing; reads what is kept."""

    def __init__(
        self,
        index: int,
        table: TableReader,
        policies: Policies,
        decisions: Decisions | None,
        under_way: Callable[[AbstractSet[str]], Iterator[Record]],
        clock: Callable[[], float],
    ) -> None:
        """`under_way`: the records of requests that have not ended, by their names. `clock`: that of the steps."""
        self._index = index
        self._table = table
        self._policies = policies
        self._decisions = decisions
        self._under_way = under_way
        self._clock = clock

    def messages(self, asked: str) -> list[bytes]:
        """The requests that go by that name, as far as they are remembered; each as JSON that fits a message."""
        return [_fitting(told) for told in self.explain(asked)]

    def explain(self, asked: str) -> list[Json]:
        """The same as plain values."""
        wanted = names(asked)
        kept = self._decisions.find(wanted) if self._decisions is not None else ()
        return [self._request(record) for record in islice(chain(self._under_way(wanted), kept), TOLD)]

    def _request(self, record: Record) -> Json:
        found = way(record.steps)
        sent = next((step for step in reversed(record.steps) if isinstance(step, Sent)), None)
        return {
            "id": record.ident.decode("ascii"),
            "request_id": record.name or None,
            "frontend": self._index,
            "path": record.path.partition("?")[0],
            "model": record.model,
            "instance": sent.chosen.where if sent is not None else None,
            "began_s_ago": self._clock() - record.began,
            "queue_ms": _rounded(found.waited_s),
            "stolen_from": found.stolen_from,
            "rescued_from": found.rescued_from,
            "tries": found.tries,
            "first_byte_ms": _rounded(record.first_byte_s),
            "duration_ms": _rounded(record.duration_s),
            "status": record.status or None,
            "outcome": record.outcome or "under way",
            "steps": [self._step(step, record.began) for step in record.steps],
        }

    def _step(self, step: Step, began: float) -> Json:
        told: Json = {"at_ms": _rounded(step.at - began)}
        match step:
            case Sent(chosen=chosen):
                legs = [self._leg(leg) for leg in chosen.legs]
                one = {**legs[0], "instance": chosen.where}
                return told | {"step": "sent"} | (one if len(legs) == 1 else {"legs": legs})
            case Queued(home=home, considered=considered):
                told |= {"step": "queued", "home": self._url(home, None)}
                return told | (self._considered(considered, home) if considered is not None else {})
            case Granted(waited_s=waited_s, home=url):
                return told | {"step": "granted", "waited_ms": _rounded(waited_s), "home": url}
            case Failed(where=where, reason=reason):
                return told | {"step": "failed", "instance": where, "reason": reason}
            case Rescued(where=where):
                return told | {"step": "rescued", "from": where}

    def _leg(self, leg: Choice) -> Json:
        told: Json = {"instance": leg.instance.url}
        if leg.considered is not None:
            told |= self._considered(leg.considered, leg.lease.slot)
        return told

    def _considered(self, considered: Considered, slot: int) -> Json:
        seen, why, role = considered.view.seen, considered.why, considered.role
        shown = _nearest(seen, None if why is None else why.scores, slot)
        return {
            "role": role.name.lower(),
            "policy": self._policies[role],
            "candidates": len(seen.slots),
            "left_out": [self._url(left, None) for left in sorted(considered.left_out)[:SHOWN]],
            "blocks": None if why is None or why.depths is None else round(why.blocks, 1),
            "reason": None if why is None else why.reason or None,
            "nearest": [self._candidate(considered, place, slot) for place in shown],
        }

    def _candidate(self, considered: Considered, place: int, slot: int) -> Json:
        seen, why = considered.view.seen, considered.why
        its = int(seen.slots[place])
        reported_ns = _at(seen.reported_ns, place)
        return {
            "instance": self._url(its, seen.generations.get(its)),
            "chosen": its == slot,
            "in_flight": _at(seen.in_flight, place),
            "tokens": _at(seen.tokens, place),
            "running": _known(_at(seen.running, place)),
            "waiting": _known(_at(seen.waiting, place)),
            "report_age_ms": _rounded((seen.now_ns - reported_ns) / 1e9) if reported_ns else None,
            "score": None if why is None else round(float(why.scores[place]), 3),
            "blocks": None if why is None else _at(why.depths, place),
        }

    def _url(self, slot: int, generation: int | None) -> str:
        for entry in self._table.entries():
            if entry.slot == slot and generation in (None, entry.generation):
                return entry.instance.url
        return f"slot {slot}, gone"


def _fitting(told: Json) -> bytes:
    """Without candidates where they are too many: what was tried again and again among long names."""
    data = msgspec.json.encode(told)
    if len(data) > MOST_BYTES:
        for step in told["steps"]:
            for leg in (step, *step.get("legs", ())):
                leg.pop("nearest", None)
        data = msgspec.json.encode(told)
    return data


def _nearest(seen: Seen, scores: Numbers | None, slot: int) -> list[int]:
    """Places among the candidates: of those that are shown, in the order of their URLs."""
    if len(seen.slots) <= SHOWN:
        return list(range(len(seen.slots)))
    by = scores if scores is not None else seen.in_flight
    order = list(range(len(seen.slots))) if by is None else np.argsort(by, kind="stable").tolist()
    chosen = np.flatnonzero(seen.slots == slot).tolist()
    return sorted([*chosen, *(place for place in order if place not in chosen)][:SHOWN])


def _known(value: int | None) -> int | None:
    return None if value == -1 else value


def _rounded(seconds: float | None) -> float | None:
    """Milliseconds, for people."""
    return None if seconds is None else round(seconds * 1e3, 3)
