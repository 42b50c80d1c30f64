"""What each connector sends to prefill and to decode, byte for byte where bytes are the client's or an engine's."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from random import Random
from typing import Any

import pytest

from broker.engines.pd import PAIRINGS, TRANSFER_KEYS, Asked, Plan, connector_of, fits_together, request_id, traits
from broker.engines.pd.base import batch_size
from broker.engines.pd.mooncake import engine_ids
from broker.errors import BadRequest, ConnectFailed, UpstreamBroken
from broker.types import Connector, EngineKind, FastDeployFields, Instance, PairFields, Role

FIXTURES = Path(__file__).parents[2] / "fixtures"

BODY = b'{ "model" : "m", "prompt":"\xc3\xa9", "seed": 9007199254740993,\n "max_tokens":7, "x": 1e+2, "stream":true }'
NAME = "mine-1"


def made(
    connector: Connector,
    body: bytes = BODY,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    seed: int = 1,
) -> Plan:
    halves = []
    for role, fields, n in ((Role.PREFILL, prefill, 1), (Role.DECODE, decode, 2)):
        host = (fields or {}).pop("host", f"10.0.0.{n}")
        pair = PairFields(connector=connector, **(fields or {}).pop("pair", {}))
        halves.append(Instance(url=f"http://{host}:80", role=role, pair=pair, **(fields or {})))
    return PAIRINGS[connector].plan(Asked(body=body, request_id=NAME), *halves, Random(seed))


def added(body: bytes, *, to: bytes = BODY) -> dict[str, Any]:
    """What was put at the end of the client's body, which is otherwise as it was."""
    kept = to.rstrip()[:-1].rstrip()
    assert body.startswith(kept + b","), body
    found: dict[str, Any] = json.loads(b"{" + body[len(kept) + 1 :])
    return found


# -- FastDeploy ------------------------------------------------------------------------------------------------


def info(prefill: dict[str, Any], decode: dict[str, Any], *, same_host: bool = False) -> dict[str, Any]:
    plan = made(
        Connector.DISAGGREGATE_INFO,
        prefill={"fastdeploy": FastDeployFields(**prefill), "host": "10.0.0.1"},
        decode={"fastdeploy": FastDeployFields(**decode), "host": "10.0.0.1" if same_host else "10.0.0.2"},
    )
    found: dict[str, Any] = added(plan.prefill.body)["disaggregate_info"]
    return found


def test_fastdeploy_gets_the_same_bytes_twice() -> None:
    plan = made(Connector.DISAGGREGATE_INFO)
    assert plan.prefill == plan.decode(b"")
    assert list(added(plan.prefill.body)) == ["disaggregate_info", "request_id"]
    assert added(plan.prefill.body)["request_id"] == NAME


def test_fastdeploy_is_told_every_key_with_its_type() -> None:
    found = info(
        {"connector_port": "7001", "tp_size": 2, "transfer_protocol": ["rdma"]},
        {"connector_port": "7002", "device_ids": ["4", "5"], "rdma_ports": ["7100", "7101"]},
    )
    assert found == {
        "prefill_ip": "10.0.0.1",
        "decode_ip": "10.0.0.2",
        "prefill_connector_port": 7001,
        "decode_connector_port": 7002,
        "decode_device_ids": ["4", "5"],
        "decode_rdma_ports": ["7100", "7101"],
        "transfer_protocol": "rdma",
        "decode_tp_size": 2,
    }


def test_fastdeploy_is_told_null_and_0_for_what_was_never_sent() -> None:
    found = info({}, {})
    assert (found["prefill_connector_port"], found["decode_connector_port"]) == (0, 0)
    assert (found["decode_device_ids"], found["decode_rdma_ports"], found["decode_tp_size"]) == (None, None, 1)


@pytest.mark.parametrize(
    ("same_host", "prefill", "decode", "tp", "protocol"),
    [
        (True, ["ipc", "rdma"], ["ipc"], (2, 2), "ipc"),
        (True, ["ipc"], ["ipc"], (2, 1), "rdma"),
        (True, ["ipc"], ["ipc"], (1, 2), "rdma"),
        (True, ["ipc"], ["rdma"], (1, 1), "rdma"),
        (True, None, ["ipc"], (1, 1), "rdma"),
        (False, ["ipc"], ["ipc"], (1, 1), "rdma"),
    ],
)
def test_fastdeploy_shares_memory_only_on_one_host_with_the_same_size(
    same_host: bool, prefill: list[str] | None, decode: list[str] | None, tp: tuple[int, int], protocol: str
) -> None:
    found = info(
        {"transfer_protocol": prefill, "tp_size": tp[0]},
        {"transfer_protocol": decode, "tp_size": tp[1]},
        same_host=same_host,
    )
    assert found["transfer_protocol"] == protocol


def test_fastdeploys_own_fields_in_a_body_are_replaced_where_they_stand() -> None:
    body = b'{"disaggregate_info" :null, "request_id": null ,"prompt":"a"}'
    sent = made(Connector.DISAGGREGATE_INFO, body).prefill.body
    assert sent.startswith(b'{"disaggregate_info" :{"prefill_ip":')
    assert sent.endswith(b'}, "request_id": "mine-1" ,"prompt":"a"}')


# -- SGLang ----------------------------------------------------------------------------------------------------


def test_sglang_gets_the_same_room_twice() -> None:
    plan = made(Connector.BOOTSTRAP, prefill={"pair": {"bootstrap_port": 9000}})
    assert plan.prefill == plan.decode(b"")
    found = added(plan.prefill.body)
    assert (found["bootstrap_host"], found["bootstrap_port"]) == ("10.0.0.1", 9000)
    assert 0 <= found["bootstrap_room"] < 2**63


def test_sglang_has_its_own_port_where_none_was_registered() -> None:
    assert added(made(Connector.BOOTSTRAP).prefill.body)["bootstrap_port"] == 8998


@pytest.mark.parametrize("body", [b'{"prompt":["a","b","c"]}', b'{"prompt":[[1],[2],[3]]}', b'{"messages":[],"n":3}'])
def test_sglang_gets_a_room_for_each_of_a_batch(body: bytes) -> None:
    found = added(made(Connector.BOOTSTRAP, body).prefill.body, to=body)
    assert found["bootstrap_host"] == ["10.0.0.1"] * 3
    assert found["bootstrap_port"] == [8998] * 3
    assert len(set(found["bootstrap_room"])) == 3


def test_rooms_differ() -> None:
    rooms = {added(made(Connector.BOOTSTRAP, seed=n).prefill.body)["bootstrap_room"] for n in range(50)}
    assert len(rooms) == 50


@pytest.mark.parametrize(
    ("body", "size"),
    [(b'{"prompt":"a"}', None), (b'{"prompt":[1,2]}', None), (b'{"n":1}', None), (b'{"prompt":["a"]}', 1)],
)
def test_one_sequence_is_no_batch_unless_it_comes_as_a_list(body: bytes, size: int | None) -> None:
    assert batch_size(body) == size


# -- vLLM, NIXL ------------------------------------------------------------------------------------------------


def test_nixl_sends_what_was_captured_from_a_real_pair() -> None:
    captured = json.loads((FIXTURES / "vllm" / "nixl_pair_0.32.0.json").read_text())
    for to_prefill, to_decode in zip(captured[::2], captured[1::2], strict=True):
        asked = {k: v for k, v in to_decode["request"].items() if k != "kv_transfer_params"}
        plan = made(Connector.NIXL, json.dumps(asked).encode())
        assert json.loads(plan.prefill.body) == to_prefill["request"]
        answer = json.dumps(to_prefill["response"], indent=2).encode()
        assert json.loads(plan.decode(answer).body) == to_decode["request"]


def test_nixl_prefill_computes_one_token_and_does_not_stream() -> None:
    body = b'{"max_completion_tokens":9,"min_tokens":3,"stream":true,"stream_options":{"include_usage":true},"x":[ ]}'
    plan = made(Connector.NIXL, body)
    sent = json.loads(plan.prefill.body)
    assert (sent["max_tokens"], sent["max_completion_tokens"], sent["stream"]) == (1, 1, False)
    assert sent.keys().isdisjoint({"stream_options", "min_tokens"})
    assert b'"x":[ ]' in plan.prefill.body
    assert plan.prefill.stream is False
    assert plan.decode(b'{"kv_transfer_params":{}}').stream is None


def test_nixl_carries_the_object_unchanged() -> None:
    given = b'{ "remote_block_ids": [[ 1,2 ]], "new_key":18446744073709551616, "f":1.50, "s":"\\u00e9\\/" }'
    leg = made(Connector.NIXL).decode(b'{"id":"a", "kv_transfer_params" : ' + given + b"}")
    assert leg.body == BODY.rstrip()[:-1].rstrip() + b',"kv_transfer_params":' + given + b" }"


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"kv_transfer_params":null}', b'{"kv_transfer_params":"x"}'])
def test_nixl_without_an_object_asks_no_decode(answer: bytes) -> None:
    with pytest.raises(UpstreamBroken):
        made(Connector.NIXL).decode(answer)


@pytest.mark.parametrize("connector", [Connector.NIXL, Connector.MOONCAKE, Connector.P2P_NCCL])
@pytest.mark.parametrize("body", [b'{"prompt":["a","b"]}', b'{"messages":[],"n":2}'])
def test_vllm_pairs_refuse_a_batch(connector: Connector, body: bytes) -> None:
    with pytest.raises(BadRequest, match="one by one"):
        made(connector, body)


# -- vLLM, Mooncake --------------------------------------------------------------------------------------------


def test_mooncake_names_the_transfer_and_the_engine_of_the_rank() -> None:
    plan = made(Connector.MOONCAKE, prefill={"pair": {"bootstrap_port": 9000, "engine_ids": ("e0", "e1")}})
    to_prefill = json.loads(plan.prefill.body)
    given = to_prefill["kv_transfer_params"]
    assert re.fullmatch(r"xfer-[0-9a-f-]{36}", given["transfer_id"])
    assert given == {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": given["transfer_id"]}
    assert (to_prefill["max_tokens"], to_prefill["stream"]) == (1, False)
    rank = int(plan.prefill.headers[b"x-data-parallel-rank"])
    assert added(plan.decode(b"").body) == {
        "kv_transfer_params": {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": given["transfer_id"],
            "remote_bootstrap_addr": "http://10.0.0.1:9000",
            "remote_engine_id": f"e{rank}",
        }
    }


def test_mooncake_pins_no_rank_where_there_is_one() -> None:
    plan = made(Connector.MOONCAKE, prefill={"pair": {"engine_ids": ("e0",)}})
    assert plan.prefill.headers == {}


def test_mooncake_without_an_engine_id_is_no_pair() -> None:
    with pytest.raises(ConnectFailed):
        made(Connector.MOONCAKE)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"0":{"engine_id":"a","worker_addr":{"0":{"0":"x"}}},"1":{"engine_id":"b"}}', ("a", "b")),
        (b'{"1":{"engine_id":"b"}}', ()),
        (b"{}", ()),
        (b"[]", ()),
        (b'{"0":{"engine_id":1}}', ()),
        (b'{"0":\xff}', ()),
    ],
)
def test_mooncakes_engine_ids_are_by_rank_and_whole(body: bytes, found: tuple[str, ...]) -> None:
    assert engine_ids(body) == found


# -- vLLM, P2P-NCCL --------------------------------------------------------------------------------------------


def test_p2p_nccl_puts_both_addresses_into_the_id_of_both() -> None:
    plan = made(
        Connector.P2P_NCCL,
        prefill={"pair": {"zmq_address": "10.0.0.1:21001"}},
        decode={"pair": {"zmq_address": "10.0.0.2:22001"}},
    )
    decode = plan.decode(b"anything")
    name = plan.prefill.headers[b"x-request-id"]
    assert decode.headers[b"x-request-id"] == name
    assert re.fullmatch(rb"___prefill_addr_10.0.0.1:21001___decode_addr_10.0.0.2:22001_[0-9a-f]{32}", name)
    assert decode.body == BODY
    assert json.loads(plan.prefill.body)["max_tokens"] == 1


def test_p2p_nccl_without_an_address_is_no_pair() -> None:
    with pytest.raises(ConnectFailed):
        made(Connector.P2P_NCCL, prefill={"pair": {"zmq_address": "10.0.0.1:21001"}})


# -- native ----------------------------------------------------------------------------------------------------


def test_native_halves_get_each_others_metadata_and_the_clients_bytes() -> None:
    plan = made(Connector.NATIVE, prefill={"transfer": b"\x00p"}, decode={"transfer": b"\x00d"})
    assert (plan.prefill.transfer, plan.decode(b"x").transfer) == (b"\x00d", b"\x00p")
    assert plan.prefill.body == plan.decode(b"x").body == BODY
    assert plan.prefill.stream is False


# -- what holds for all ----------------------------------------------------------------------------------------


def test_a_request_id_is_kept_or_made() -> None:
    assert request_id(b'{"request_id":"\\u0061b"}', refuse=True) == "ab"
    assert request_id(b'{"request_id":""}', refuse=True) == ""
    for body in (b"{}", b'{"request_id":null}'):
        assert uuid.UUID(request_id(body, refuse=True)).version == 4


@pytest.mark.parametrize("value", [b"1", b"[]", b"{}", b"true", pytest.param(b'"%b"' % (b"r" * 1025), id="long")])
def test_a_request_id_that_is_no_string_or_a_long_one_is_refused(value: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        request_id(b'{"request_id":' + value + b"}", refuse=True)
    assert refused.value.param == "request_id"


@pytest.mark.parametrize("key", TRANSFER_KEYS)
def test_clients_may_not_say_where_to_fetch(key: str) -> None:
    body = json.dumps({"prompt": "a", key: {"remote_host": "evil"}}).encode()
    with pytest.raises(BadRequest) as refused:
        request_id(body, refuse=True)
    assert refused.value.param == key
    assert request_id(body, refuse=False)
    hidden = body.replace(key.encode(), f"\\u{ord(key[0]):04x}{key[1:]}".encode())
    with pytest.raises(BadRequest):
        request_id(hidden, refuse=True)
    with pytest.raises(BadRequest):
        request_id(b'{"' + key.encode() + b'":null,"' + key.encode() + b'":1}', refuse=False)


@pytest.mark.parametrize(
    ("kind", "connector"),
    [
        (EngineKind.FASTDEPLOY, Connector.DISAGGREGATE_INFO),
        (EngineKind.OPENAI, Connector.DISAGGREGATE_INFO),
        (EngineKind.VLLM, Connector.NIXL),
        (EngineKind.SGLANG, Connector.BOOTSTRAP),
        (EngineKind.NATIVE, Connector.NATIVE),
    ],
)
def test_every_kind_of_engine_has_a_connector(kind: EngineKind, connector: Connector) -> None:
    assert connector_of(Instance(url="http://a:1", engine=kind)) is connector
    other = PairFields(connector=Connector.MOONCAKE)
    assert connector_of(Instance(url="http://a:1", engine=kind, pair=other)) is Connector.MOONCAKE


@pytest.mark.parametrize(
    ("connector", "prefill", "decode", "fit"),
    [
        (Connector.DISAGGREGATE_INFO, 2, 2, True),
        (Connector.DISAGGREGATE_INFO, 2, 1, True),
        (Connector.DISAGGREGATE_INFO, 1, 2, False),
        (Connector.NIXL, 2, 4, True),
        (Connector.NIXL, 2, 3, False),
        (Connector.NIXL, 0, 3, True),
        (Connector.MOONCAKE, 2, 4, False),
        (Connector.P2P_NCCL, 1, 1, True),
        (Connector.P2P_NCCL, 1, 2, False),
        (Connector.BOOTSTRAP, 1, 8, True),
    ],
)
def test_sizes_fit_as_the_connector_says(connector: Connector, prefill: int, decode: int, fit: bool) -> None:
    halves = [
        traits(
            Instance(url="http://a:1", pair=PairFields(connector=connector), fastdeploy=FastDeployFields(tp_size=size))
        )
        for size in (prefill, decode)
    ]
    assert fits_together(*halves) is fit
