"""vLLM's MooncakeConnector: a `transfer_id` of the router's, both at the same time.

Decode is also told prefill's bootstrap server and engine id. Each data-parallel rank has an engine id of its own, so
prefill's rank is pinned by a header. The ids are asked of the bootstrap server by the scheduler.
"""

from __future__ import annotations

import uuid
from random import Random

import msgspec

from broker.engines.pd.base import (
    BOOTSTRAP_PORT,
    RETRIED,
    Asked,
    Leg,
    Plan,
    Traits,
    bracketed,
    encode,
    equal,
    first_token_only,
    host_of,
    pair_fields,
    single,
)
from broker.errors import UNDECODABLE, ConnectFailed
from broker.splice import replace_member
from broker.types import Connector, Instance, Role

ENGINE_IDS_PATH = "/query"
MOST_RANKS = 64
KEY = "kv_transfer_params"
RANK = b"x-data-parallel-rank"


class Mooncake:
    sequential = False
    retried = RETRIED
    gives_back = False

    def fits(self, prefill: Traits, decode: Traits) -> bool:
        return equal(prefill, decode)

    def plan(self, asked: Asked, prefill: Instance, decode: Instance, rng: Random) -> Plan:
        single(asked.body)
        engine_ids = pair_fields(prefill).engine_ids
        if not engine_ids:
            raise ConnectFailed(f"{prefill.url} has not said its engine id at {bootstrap_address(prefill)}/query")
        rank = rng.randrange(len(engine_ids))
        name = f"xfer-{uuid.UUID(int=rng.getrandbits(128), version=4)}"
        to_prefill = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": name}
        to_decode = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": name,
            "remote_bootstrap_addr": bootstrap_address(prefill),
            "remote_engine_id": engine_ids[rank],
        }
        decode_leg = Leg(body=replace_member(asked.body, KEY, encode(to_decode)))
        return Plan(
            Leg(
                body=first_token_only(asked.body, {KEY: encode(to_prefill)}),
                headers={RANK: b"%d" % rank} if len(engine_ids) > 1 else {},
                stream=False,
            ),
            lambda _: decode_leg,
        )


def bootstrap_address(prefill: Instance) -> str:
    """Of its bootstrap server; the scheme is needed."""
    return f"http://{bracketed(host_of(prefill))}:{pair_fields(prefill).bootstrap_port or BOOTSTRAP_PORT}"


def asks_engine_ids(instance: Instance) -> bool:
    """Whether its bootstrap server must be asked before it can be one half of a pair."""
    return instance.role is Role.PREFILL and pair_fields(instance).connector is Connector.MOONCAKE


class _Rank(msgspec.Struct):
    engine_id: str


def engine_ids(body: bytes) -> tuple[str, ...]:
    """From the answer at `ENGINE_IDS_PATH`: rank -> engine. Empty = it makes no sense, or ranks are missing yet."""
    try:
        ranks = msgspec.json.decode(body, type=dict[str, _Rank])
    except UNDECODABLE:
        return ()
    found = tuple(ranks[str(rank)].engine_id for rank in range(len(ranks)) if str(rank) in ranks)
    return found if len(found) == len(ranks) <= MOST_RANKS else ()


def with_engine_ids(instance: Instance, found: tuple[str, ...]) -> Instance:
    """The instance with what its bootstrap server says; an engine that was started again has other ids."""
    known = pair_fields(instance)
    if not found or found == known.engine_ids:
        return instance
    return msgspec.structs.replace(instance, pair=msgspec.structs.replace(known, engine_ids=found))
