"""Penstock's own protocol: each half is given the other's registered metadata, prefill first.

The body is the same for both; a prefill engine knows from its role that it is to fill and not to answer. What it
answers is dropped. Both see the same `x-request-id`.
"""

from __future__ import annotations

from random import Random

from broker.engines.pd.base import RETRIED, Asked, Leg, Plan, Traits
from broker.types import Instance


class Native:
    sequential = True
    retried = RETRIED
    gives_back = False

    def fits(self, prefill: Traits, decode: Traits) -> bool:
        return True  # how it is split is the engines' own affair, written in their metadata

    def plan(self, asked: Asked, prefill: Instance, decode: Instance, rng: Random) -> Plan:
        return Plan(
            Leg(body=asked.body, transfer=decode.transfer, stream=False),
            lambda _: Leg(body=asked.body, transfer=prefill.transfer),
        )
