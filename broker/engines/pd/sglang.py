"""SGLang: the same `bootstrap_host`, `bootstrap_port` and `bootstrap_room` to both, at the same time.

Decode finds prefill's bootstrap server there and waits in the room. A batch needs a room for each of its sequences.
"""

from __future__ import annotations

from random import Random

from broker.engines.pd.base import (
    BOOTSTRAP_PORT,
    RETRIED,
    Asked,
    Leg,
    Plan,
    Traits,
    batch_size,
    bracketed,
    encode,
    host_of,
    pair_fields,
)
from broker.errors import BadRequest
from broker.splice import edit_members
from broker.types import Instance

MOST_IN_A_BATCH = 4096


class Bootstrap:
    sequential = False
    retried = RETRIED
    gives_back = False

    def fits(self, prefill: Traits, decode: Traits) -> bool:
        return True  # the engines re-shard between different sizes

    def plan(self, asked: Asked, prefill: Instance, decode: Instance, rng: Random) -> Plan:
        host: object = bracketed(host_of(prefill))
        port: object = pair_fields(prefill).bootstrap_port or BOOTSTRAP_PORT
        room: object = rng.getrandbits(63)
        size = batch_size(asked.body)
        if size is not None:
            if size > MOST_IN_A_BATCH:
                raise BadRequest(f"a batch may have {MOST_IN_A_BATCH} sequences, not {size}")
            host, port = [host] * size, [port] * size
            room = [rng.getrandbits(63) for _ in range(size)]
        given = {"bootstrap_host": encode(host), "bootstrap_port": encode(port), "bootstrap_room": encode(room)}
        leg = Leg(body=edit_members(asked.body, given))
        return Plan(leg, lambda _: leg)
