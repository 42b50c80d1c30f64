"""A view made by hand, for tests of policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from broker.policies.base import FEW, Vector
from broker.types import Trust


def vector(values: Sequence[int]) -> Vector:
    return np.array(values, dtype=np.int64)


@dataclass
class FakeLoads:
    """`broker.policies.Loads` over n candidates: slots 100, 101, … and everything idle and exactly known."""

    n: int
    slots: Vector = field(init=False)
    in_flight: Vector = field(init=False)
    tokens: Vector = field(init=False)
    waiting: Vector = field(init=False)
    trust: Vector = field(init=False)
    load: Vector = field(init=False)

    def __post_init__(self) -> None:
        self.slots = np.arange(100, 100 + self.n, dtype=np.int64)
        self.in_flight, self.tokens, self.waiting, self.load = np.zeros((4, self.n), dtype=np.int64)
        self.trust = np.full(self.n, Trust.EXACT, dtype=np.int64)

    @property
    def listed(self) -> tuple[int, ...]:
        return tuple(self.slots.tolist())

    @property
    def requests(self) -> tuple[int, ...] | Vector:
        return tuple(self.in_flight.tolist()) if self.n <= FEW else self.in_flight

    def having(self, **vectors: Sequence[int]) -> FakeLoads:
        """Sets vectors by name."""
        for name, values in vectors.items():
            assert len(values) == self.n, name
            setattr(self, name, vector(values))
        return self
