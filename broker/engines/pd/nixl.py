"""vLLM's NixlConnector: prefill computes one token and answers where its blocks are; decode is given that object.

The object has had fifteen forms so far. It is carried byte for byte: a decode that misses a key of it hangs, or dies.
"""

from __future__ import annotations

from random import Random

from broker.engines.pd.base import RETRIED, Asked, Leg, Plan, Traits, answered_member, divides, first_token_only, single
from broker.splice import replace_member
from broker.types import Instance

KEY = "kv_transfer_params"
_ASK = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
    b'"remote_host":null,"remote_port":null}'
)


class Nixl:
    sequential = True
    retried = RETRIED | {500}  # what decode answers when it cannot reach prefill's side channel
    gives_back = False

    def fits(self, prefill: Traits, decode: Traits) -> bool:
        return divides(prefill, decode)

    def plan(self, asked: Asked, prefill: Instance, decode: Instance, rng: Random) -> Plan:
        single(asked.body)
        return Plan(
            Leg(body=first_token_only(asked.body, {KEY: _ASK}), stream=False),
            lambda answer: Leg(body=replace_member(asked.body, KEY, answered_member(answer, KEY))),
        )
