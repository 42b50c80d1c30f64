"""FastDeploy: `disaggregate_info` and one `request_id`, the same bytes to both, at the same time.

Prefill asks decode for blocks over the connector and pushes the KV cache there; decode answers the client. Engines do
not check the object (a missing key is a hang), so it is built here with every key and type that they read.
"""

from __future__ import annotations

from random import Random

import msgspec

from broker.engines.pd.base import RETRIED, Asked, Changes, Leg, Plan, Traits, encode, host_of
from broker.errors import UNDECODABLE
from broker.splice import edit_members
from broker.types import FastDeployFields, Instance

_RESCHEDULE = b"pd_reschedule"


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []


class DisaggregateInfo:
    sequential = False
    retried = RETRIED | {501}  # decode's word for a transfer that failed
    gives_back = True

    def __init__(self, *, any_tp: bool = False) -> None:
        """`any_tp`: pairs are not looked at, as the original router does not."""
        self._any_tp = any_tp

    def fits(self, prefill: Traits, decode: Traits) -> bool:
        return self._any_tp or prefill.tp == decode.tp or decode.tp == 1

    def plan(self, asked: Asked, prefill: Instance, decode: Instance, rng: Random) -> Plan:
        changes: Changes = {
            "disaggregate_info": encode(disaggregate_info(prefill, decode)),
            "request_id": encode(asked.request_id),
        }
        leg = Leg(body=edit_members(asked.body, changes))
        return Plan(leg, lambda _: leg)


def given_back(answer: bytes) -> bool:
    """Whether decode ran out of blocks, dropped the request, and this is what it had by then."""
    if _RESCHEDULE not in answer:
        return False
    try:
        choices = msgspec.json.decode(answer, type=_Answer).choices
    except UNDECODABLE:
        return False
    return any(choice.finish_reason == "pd_reschedule" for choice in choices)


def disaggregate_info(prefill: Instance, decode: Instance) -> dict[str, object]:
    ours, theirs = fields(prefill), fields(decode)
    return {
        "prefill_ip": host_of(prefill),
        "decode_ip": host_of(decode),
        "prefill_connector_port": _number(ours.connector_port),
        "decode_connector_port": _number(theirs.connector_port),
        "decode_device_ids": theirs.device_ids,
        "decode_rdma_ports": theirs.rdma_ports,
        "transfer_protocol": "ipc" if _share_memory(prefill, decode) else "rdma",
        "decode_tp_size": tp_size(decode),
    }


def fields(instance: Instance) -> FastDeployFields:
    return instance.fastdeploy or FastDeployFields()


def tp_size(instance: Instance) -> int:
    """As registered, else one per device, else 1."""
    found = fields(instance)
    return max(found.tp_size, 0) or len(found.device_ids or ()) or 1


def _share_memory(prefill: Instance, decode: Instance) -> bool:
    return (
        host_of(prefill) == host_of(decode) != ""
        and all("ipc" in (fields(instance).transfer_protocol or ()) for instance in (prefill, decode))
        and tp_size(prefill) == tp_size(decode)
    )


def _number(port: str) -> int:
    return int(port) if port.isdecimal() and port.isascii() else 0
