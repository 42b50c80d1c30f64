"""vLLM's P2pNcclConnector (up to 0.23): the request id carries both ZMQ addresses, and reaches both unchanged.

Prefill computes one token, its answer is dropped; decode gets the client's body. Both need the same path, as vLLM puts
`cmpl-` or `chatcmpl-` before the id.
"""

from __future__ import annotations

from random import Random

from broker.engines.pd.base import RETRIED, Asked, Leg, Plan, Traits, equal, first_token_only, pair_fields, single
from broker.errors import ConnectFailed
from broker.types import Instance


class P2pNccl:
    sequential = True
    retried = RETRIED
    gives_back = False

    def fits(self, prefill: Traits, decode: Traits) -> bool:
        return equal(prefill, decode)

    def plan(self, asked: Asked, prefill: Instance, decode: Instance, rng: Random) -> Plan:
        single(asked.body)
        ours, theirs = pair_fields(prefill).zmq_address, pair_fields(decode).zmq_address
        for instance, address in ((prefill, ours), (decode, theirs)):
            if not address:
                raise ConnectFailed(f"{instance.url} is registered without its zmq_address")
        name = f"___prefill_addr_{ours}___decode_addr_{theirs}_{rng.getrandbits(128):032x}"
        headers = {b"x-request-id": name.encode()}
        return Plan(
            Leg(body=first_token_only(asked.body), headers=headers, stream=False),
            lambda _: Leg(body=asked.body, headers=headers),
        )
