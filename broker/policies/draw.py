"""The one way in which ties are broken."""

from __future__ import annotations

from random import Random
from typing import Final

import numpy as np
from numpy.typing import NDArray

FEW: Final = 16
"""Candidates up to which a list is looked through faster than numpy is called."""


def least(scores: tuple[int, ...] | NDArray[np.int64] | NDArray[np.float64], rng: Random) -> int:
    """Index of the smallest score; each of several equal ones is as likely as the others.

    Never "the first": idle instances tie at 0, and then all of a light load went to one of them.

    Measured per call at 8 / 1,024 candidates (benchmarks/test_policies.py): with numpy 1.1 / 1.7 us, all equal 1.2 /
    2.2; `flatnonzero(s == s.min())` 2.7 / 3.2, spent in numpy's Python wrappers; a Python list 0.4 / 34, all equal 0.8;
    `argmin` alone 0.4. `argmin` from a random place on would save the comparison, but is not fair: of two ties side by
    side one would get all but 1/n of the choices.
    """
    if isinstance(scores, tuple):
        return _least_of_few(scores, rng)
    if len(scores) <= FEW:
        values = scores.tolist()
        best = min(values)
        if values.count(best) == 1:
            return int(values.index(best))
        equal = [i for i, value in enumerate(values) if value == best]
        return equal[int(rng.random() * len(equal))]
    first = scores.argmin()
    ties = (scores == scores[first]).nonzero()[0]
    n = len(ties)
    return int(first) if n == 1 else int(ties[int(rng.random() * n)])


def _least_of_few(scores: tuple[int, ...], rng: Random) -> int:
    """Without a call but for the draw, which compiled is a tenth of the above."""
    best, ties = scores[0], 0
    for score in scores:
        if score < best:
            best, ties = score, 1
        elif score == best:
            ties += 1
    skipped = int(rng.random() * ties) if ties > 1 else 0
    index = 0
    for score in scores:
        if score == best:
            if skipped == 0:
                break
            skipped -= 1
        index += 1
    return index
