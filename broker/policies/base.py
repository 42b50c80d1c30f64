"""What a policy is, and what it sees.

A policy is pure: it reads vectors over the candidates and draws from the generator it was given. It keeps no copy of
any load, because the choice itself is visible in the next view: the lease taken on it raises a counter that every
frontend reads. What it is told is who got a request's prompt in the end (`placed`): a choice may be given back, a place
granted elsewhere, an attempt repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.config import Scheduler
from broker.policies.draw import FEW, least
from broker.route import RouteRequest

__all__ = ["FEW", "Loads", "Numbers", "Options", "Picker", "Vector", "Why", "least"]

Vector = NDArray[np.int64]
Numbers = Sequence[float] | Vector | NDArray[np.float64]


class Why(msgspec.Struct, frozen=True, gc=False):
    """What decided a choice beyond what the view shows. Numbers of the candidates, kept as they are: reading them is
    for whoever asks, later."""

    scores: Numbers
    """The least wins."""
    depths: Sequence[int] | Vector | None = None
    """Leading blocks of the prompt that each had been sent; None: its prompt did not count."""
    blocks: float = 0.0
    """Of the prompt; the last one need not be full."""
    loads: Sequence[int] | Vector | None = None
    """Requests, where they were weighed against `hits`."""
    hits: Sequence[int] | Vector | None = None
    """Percentages of the prompt, where these count."""
    reason: str = ""
    """Why the prompt did not count."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The settings that policies read, the same for all of them."""

    waiting_weight: float = 1.0
    """What a waiting request counts where a running one counts 1."""
    balance_abs_threshold: float = 1.0
    """Loads that differ by more requests than this, and by more than the other threshold, are balanced first."""
    balance_rel_threshold: float = 0.2
    """As a part of the largest load."""
    hit_ratio_weight: float = 1.0
    load_balance_weight: float = 1.0

    @classmethod
    def of(cls, settings: Scheduler) -> Options:
        return cls(**{name: getattr(settings, name) for name in cls.__struct_fields__})


class Loads(Protocol):
    """What a policy sees of the candidates: vectors of one length, sorted by the instances' URLs; at least one.

    `broker.view.View` is the real one. A number that an engine did not say is -1.
    """

    @property
    def slots(self) -> Vector:
        """Slots in the load table; a policy returns one of them."""

    @property
    def listed(self) -> tuple[int, ...]:
        """`slots`, for who wants some of them: a vector gives a single one slowly."""

    @property
    def in_flight(self) -> Vector:
        """Requests that all frontends of this host have with the instance at this moment; exact."""

    @property
    def requests(self) -> tuple[int, ...] | Vector:
        """`in_flight`, in the form that is looked through fastest: a tuple of few candidates, a vector of many."""

    @property
    def tokens(self) -> Vector:
        """Prompt tokens of those requests."""

    @property
    def waiting(self) -> Vector:
        """Requests in the engine's own queue, as it last reported."""

    @property
    def trust(self) -> Vector:
        """`Trust` of the last report; STALE also when there is none or it is too old."""

    @property
    def load(self) -> Vector:
        """Requests at the instance, those of other routers included: the last report, and what this host's counters
        have moved since. `in_flight` where there is no report to trust."""


class Picker(Protocol):
    """How one of the candidates is chosen."""

    def pick(self, request: RouteRequest, view: Loads) -> int:
        """The slot of one candidate. No I/O, no waiting, microseconds; never raises for a view that has candidates."""
