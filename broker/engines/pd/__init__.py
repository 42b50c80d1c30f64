"""How each connector brings a prefill and a decode instance together."""

from __future__ import annotations

from collections.abc import Mapping

from broker.engines.pd.base import TRANSFER_KEYS, Asked, Leg, Pairing, Plan, Traits, request_id
from broker.engines.pd.fastdeploy import DisaggregateInfo, given_back, tp_size
from broker.engines.pd.mooncake import Mooncake
from broker.engines.pd.native import Native
from broker.engines.pd.nixl import Nixl
from broker.engines.pd.p2p_nccl import P2pNccl
from broker.engines.pd.sglang import Bootstrap
from broker.types import Connector, EngineKind, Instance

__all__ = [
    "PAIRINGS",
    "TRANSFER_KEYS",
    "Asked",
    "Leg",
    "Pairing",
    "Plan",
    "Traits",
    "connector_of",
    "fits_together",
    "given_back",
    "pairings",
    "request_id",
    "traits",
]


def pairings(*, any_tp: bool = False) -> Mapping[Connector, Pairing]:
    """One for each connector. `any_tp`: FastDeploy's pairs may be of any two sizes."""
    return {
        Connector.DISAGGREGATE_INFO: DisaggregateInfo(any_tp=any_tp),
        Connector.BOOTSTRAP: Bootstrap(),
        Connector.NIXL: Nixl(),
        Connector.MOONCAKE: Mooncake(),
        Connector.P2P_NCCL: P2pNccl(),
        Connector.NATIVE: Native(),
    }


PAIRINGS = pairings()

_DEFAULTS = {
    EngineKind.FASTDEPLOY: Connector.DISAGGREGATE_INFO,
    EngineKind.OPENAI: Connector.DISAGGREGATE_INFO,  # of unknown make: what the original router gives to everyone
    EngineKind.SGLANG: Connector.BOOTSTRAP,
    EngineKind.VLLM: Connector.NIXL,
    EngineKind.NATIVE: Connector.NATIVE,
}


def connector_of(instance: Instance) -> Connector:
    """As registered, else what its kind of engine has by default."""
    registered = instance.pair.connector if instance.pair else None
    return registered or _DEFAULTS[instance.engine]


def traits(instance: Instance) -> Traits:
    connector = connector_of(instance)
    if connector is Connector.DISAGGREGATE_INFO:
        tp = tp_size(instance)
    else:
        tp = max(instance.fastdeploy.tp_size, 0) if instance.fastdeploy else 0
    return Traits(connector, tp, instance.models)


def fits_together(prefill: Traits, decode: Traits, pairings: Mapping[Connector, Pairing] = PAIRINGS) -> bool:
    """Same connector, a model in common (unknown ones fit any), tensor-parallel sizes as the connector says."""
    return (
        prefill.connector is decode.connector
        and (not prefill.models or not decode.models or not set(prefill.models).isdisjoint(decode.models))
        and pairings[prefill.connector].fits(prefill, decode)
    )
