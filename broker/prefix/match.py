"""What the index knows of one prompt."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from broker.prefix.keys import Vector
from shm.hashtable import HORIZON, Found


class Match(msgspec.Struct, frozen=True, gc=False):
    """What the index knows of one prompt, at one moment."""

    keys: Vector
    """One per full block, at most the cap."""
    blocks: float
    """Length of the whole prompt in blocks; the last one need not be full, and the cap does not count."""
    depths: Vector
    """By slot: how many leading blocks the instance has been sent."""
    found: Found
    """What the shared table says of the keys."""
    pending: list[int]
    """Blocks in common with each own notice that the table does not have yet,"""
    noted: int
    """and how many of these there are, whatever they have in common."""

    @property
    def requests(self) -> float:
        """How many recent requests there were at all. Recent: of the last `shm.hashtable.HORIZON` or so, older ones
        fading."""
        return self.noted - HORIZON * math.expm1(-self.found.tick / HORIZON)

    @property
    def age(self) -> int:
        """How many requests ago the last known block was used, by whomever."""
        return 0 if self.pending else self.found.age

    def uses(self, blocks: Vector) -> NDArray[np.float64]:
        """How many recent requests began with all up to each of these blocks, which rise from 0 on."""
        at = self.found.at
        if len(at) and at.item(-1) < len(at) and blocks.item(-1) < len(at):
            uses = self.found.uses(blocks)
        else:  # who has a later block has those before it: of one that the table has lost, the next one speaks
            where = np.searchsorted(at, blocks)
            known = int(np.searchsorted(where, len(at)))
            uses = np.zeros(len(blocks))
            uses[:known] = self.found.uses(where[:known])
        if self.pending:
            pending = np.sort(self.pending)
            uses += len(pending) - pending.searchsorted(blocks, "right")
        return uses

    def cached(self, prompt_tokens: int) -> dict[int, int]:
        """Tokens of a prompt of that many that instances have been sent, by slot; who has none of it is left out."""
        per_block = prompt_tokens / max(self.blocks, 1.0)
        slots = self.depths.nonzero()[0].tolist()
        return {slot: round(min(per_block * self.depths.item(slot), prompt_tokens)) for slot in slots}
