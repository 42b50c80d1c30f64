"""What may register, what it becomes, and which field a refusal names."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from broker import wire
from broker.errors import BadRegistration, MetadataTooLarge
from broker.faces import Event
from broker.scheduler.fields import from_hello, parse, parse_body
from broker.scheduler.registrar import read_entries
from broker.types import EngineKind, FastDeployFields, Instance, Role

BASE: dict[str, Any] = {"role": "mixed", "host_ip": "10.0.0.1", "port": 8000}


def registered(splitwise: bool = False, /, **fields: object) -> Instance:
    return parse_body(json.dumps({**BASE, **fields}).encode(), splitwise).instance


def test_the_least_registration() -> None:
    assert registered() == Instance(url="http://10.0.0.1:8000", metrics_url="http://10.0.0.1:8000/metrics")


def test_what_a_fastdeploy_engine_sends() -> None:
    instance = registered(
        True,
        role="prefill",
        port="8188",
        metrics_port=8190,
        connector_port=None,
        engine_worker_queue_port="8189",
        rdma_ports=[7100, "7101", 7102.0],
        device_ids=[0, 1],
        transfer_protocol=["ipc", "rdma"],
        tp_size=2,
        is_paused=False,
        version=None,
        connected_decodes=[{}],
    )
    assert instance == Instance(
        url="http://10.0.0.1:8188",
        role=Role.PREFILL,
        metrics_url="http://10.0.0.1:8190/metrics",
        fastdeploy=FastDeployFields(
            connector_port="0",
            engine_worker_queue_port="8189",
            transfer_protocol=["ipc", "rdma"],
            rdma_ports=["7100", "7101", "7102"],
            device_ids=["0", "1"],
            metrics_port="8190",
            tp_size=2,
        ),
    )


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"host_ip": "10.0.0.1"}, "http://10.0.0.1:8000"),
        ({"host_ip": "http://10.0.0.1"}, "http://10.0.0.1:8000"),
        ({"host_ip": "https://10.0.0.1/"}, "https://10.0.0.1:8000"),
        ({"host_ip": "::1"}, "http://[::1]:8000"),
        ({"host_ip": "[::1]"}, "http://[::1]:8000"),
        ({"host_ip": "http://[2001:DB8:0::1]"}, "http://[2001:db8::1]:8000"),
        ({"host_ip": "Engine-1.pods.local"}, "http://engine-1.pods.local:8000"),
        ({"host_ip": "engine_1"}, "http://engine_1:8000"),
        ({"host_ip": "localhost"}, "http://localhost:8000"),
        ({"port": "8000"}, "http://10.0.0.1:8000"),
        ({"port": 65535}, "http://10.0.0.1:65535"),
        ({"engine": "native"}, "tcp://10.0.0.1:8000"),
        ({"engine": "native", "host_ip": "tcp://::1"}, "tcp://[::1]:8000"),
    ],
)
def test_where_it_is(fields: dict[str, object], url: str) -> None:
    assert registered(**fields).url == url


@pytest.mark.parametrize(
    ("role", "splitwise", "expected"),
    [
        ("mixed", False, Role.MIXED),
        ("MiXeD", False, Role.MIXED),
        (0, False, Role.MIXED),
        (None, False, Role.MIXED),
        ("prefill", True, Role.PREFILL),
        (1, True, Role.PREFILL),
        ("Decode", True, Role.DECODE),
        (2, True, Role.DECODE),
    ],
)
def test_roles(role: object, splitwise: bool, expected: Role) -> None:
    assert registered(splitwise, role=role).role is expected


@pytest.mark.parametrize(
    ("fields", "attribute", "expected"),
    [
        ({"metrics_port": None}, "metrics_url", "http://10.0.0.1:8000/metrics"),
        ({"metrics_port": ""}, "metrics_url", "http://10.0.0.1:8000/metrics"),
        ({"metrics_port": "9100"}, "metrics_url", "http://10.0.0.1:9100/metrics"),
        ({"models": ["a", "b", "a"]}, "models", ("a", "b")),
        ({"models": "a, b,,"}, "models", ("a", "b")),
        ({"models": None}, "models", ()),
        ({"capacity": 64}, "capacity", 64),
        ({"capacity": None}, "capacity", 0),
        ({"engine": "SGLang"}, "engine", EngineKind.SGLANG),
        ({"engine": None}, "engine", EngineKind.OPENAI),
        ({"load_endpoint": "tcp://10.0.0.1:5600"}, "load_endpoint", "tcp://10.0.0.1:5600"),
        ({"load_endpoint": ["tcp://h:1", "tcp://[::1]:2"]}, "load_endpoint", "tcp://h:1,tcp://[::1]:2"),
        ({"transfer": None}, "transfer", b""),
    ],
)
def test_optional_fields(fields: dict[str, object], attribute: str, expected: object) -> None:
    assert getattr(registered(**fields), attribute) == expected


@pytest.mark.parametrize(
    ("fields", "attribute", "expected"),
    [
        ({"rdma_ports": None}, "rdma_ports", []),
        ({"rdma_ports": "7100, 7101"}, "rdma_ports", ["7100", "7101"]),
        ({"device_ids": "0,1"}, "device_ids", ["0", "1"]),
        ({"device_ids": [0, "1", 2.0]}, "device_ids", ["0", "1", "2"]),
        ({"transfer_protocol": "ipc,rdma"}, "transfer_protocol", ["ipc", "rdma"]),
        ({"transfer_protocol": None}, "transfer_protocol", None),
        ({"tp_size": None}, "tp_size", 0),
        ({"connector_port": 99999}, "connector_port", "99999"),
        ({"engine_worker_queue_port": None}, "engine_worker_queue_port", "0"),
        ({"metrics_port": None}, "metrics_port", "8000"),
    ],
)
def test_fastdeploy_coercions(fields: dict[str, object], attribute: str, expected: object) -> None:
    fastdeploy = registered(**fields).fastdeploy
    assert fastdeploy is not None
    assert getattr(fastdeploy, attribute) == expected


def test_transfer_is_kept_byte_for_byte() -> None:
    transfer = b'{ "z":1,  "a":[18446744073709551615, 1.10], "n":{"\\u00e9":"\\u0000"} }'
    body = b'{"role":0,"host_ip":"h","port":1,"transfer":' + transfer + b"}"
    assert parse_body(body, False).instance.transfer == transfer


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"role": "both"}, "role"),
        ({"role": ""}, "role"),
        ({"role": 7}, "role"),
        ({"role": True}, "role"),
        ({"role": 1.0}, "role"),
        ({"role": [0]}, "role"),
        ({"role": "prefill"}, "role"),
        ({"role": 2}, "role"),
        ({"host_ip": None}, "host_ip"),
        ({"host_ip": ""}, "host_ip"),
        ({"host_ip": 5}, "host_ip"),
        ({"host_ip": "256.1.1.1"}, "host_ip"),
        ({"host_ip": "1.2.3"}, "host_ip"),
        ({"host_ip": "a b"}, "host_ip"),
        ({"host_ip": "h:80"}, "host_ip"),
        ({"host_ip": "h/path"}, "host_ip"),
        ({"host_ip": "user@h"}, "host_ip"),
        ({"host_ip": "ftp://h"}, "host_ip"),
        ({"host_ip": "fe80::1%eth0"}, "host_ip"),
        ({"host_ip": "-h"}, "host_ip"),
        ({"host_ip": "h" * 300}, "host_ip"),
        ({"host_ip": "tcp://h"}, "host_ip"),
        ({"host_ip": "http://h", "engine": "native"}, "host_ip"),
        ({"port": None}, "port"),
        ({"port": ""}, "port"),
        ({"port": 0}, "port"),
        ({"port": 65536}, "port"),
        ({"port": -1}, "port"),
        ({"port": "80x"}, "port"),
        ({"port": "٨٠"}, "port"),
        ({"port": 80.0}, "port"),
        ({"port": True}, "port"),
        ({"metrics_port": 0}, "metrics_port"),
        ({"metrics_port": []}, "metrics_port"),
        ({"engine": "tgi"}, "engine"),
        ({"engine": 1}, "engine"),
        ({"models": 5}, "models"),
        ({"models": [1]}, "models"),
        ({"models": {}}, "models"),
        ({"models": [str(n) for n in range(1000)]}, "models"),
        ({"capacity": -1}, "capacity"),
        ({"capacity": "8"}, "capacity"),
        ({"capacity": 1 << 40}, "capacity"),
        ({"transfer": "x"}, "transfer"),
        ({"transfer": [1]}, "transfer"),
        ({"transfer": {"k": "x" * 8000}}, "transfer"),
        ({"load_endpoint": "http://h:1"}, "load_endpoint"),
        ({"load_endpoint": "tcp://*:1"}, "load_endpoint"),
        ({"load_endpoint": "tcp://0.0.0.0:1"}, "load_endpoint"),
        ({"load_endpoint": "tcp://h:99999"}, "load_endpoint"),
        ({"load_endpoint": [5]}, "load_endpoint"),
        ({"transfer_protocol": ["tcp"]}, "transfer_protocol"),
        ({"rdma_ports": [1.5]}, "rdma_ports"),
        ({"rdma_ports": [None]}, "rdma_ports"),
        ({"rdma_ports": 7100}, "rdma_ports"),
        ({"device_ids": [[]]}, "device_ids"),
        ({"tp_size": "2"}, "tp_size"),
        ({"connector_port": []}, "connector_port"),
    ],
)
def test_a_refusal_names_the_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(BadRegistration, match=f"^{field} ") as caught:
        registered(**fields)
    assert (caught.value.param, caught.value.status) == (field, 400)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"role": "mixed"}, "role"),
        ({"role": None}, "role"),
        ({"connector_port": 99999}, "connector_port"),
        ({"connector_port": "x"}, "connector_port"),
        ({"engine_worker_queue_port": -1}, "engine_worker_queue_port"),
        ({"rdma_ports": [0]}, "rdma_ports"),
        ({"rdma_ports": ["7100", "70000"]}, "rdma_ports"),
    ],
)
def test_splitwise_looks_at_what_pairs_use(fields: dict[str, object], field: str) -> None:
    with pytest.raises(BadRegistration) as caught:
        registered(True, **{"role": "decode", **fields})
    assert caught.value.param == field


@pytest.mark.parametrize("missing", ["role", "host_ip", "port"])
def test_what_must_be_there(missing: str) -> None:
    fields = {key: value for key, value in BASE.items() if key != missing}
    with pytest.raises(BadRegistration, match=f"^{missing} is required$"):
        parse(fields, False)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"role":0', b"[" * 50_000])
def test_a_body_that_is_no_object(body: bytes) -> None:
    with pytest.raises(BadRegistration):
        parse_body(body, False)


def test_too_much_transfer_says_so() -> None:
    with pytest.raises(MetadataTooLarge, match=str(wire.MAX_TRANSFER_BYTES)):
        registered(transfer={"k": "x" * wire.MAX_TRANSFER_BYTES})


def test_an_entry_of_yaml_is_read_the_same() -> None:
    entry = yaml.safe_load(
        """
        role: "decode"
        host_ip: 127.0.0.1
        port: 8200
        connector_port: 8201
        engine_worker_queue_port: 8202
        transfer_protocol: [ipc, rdma]
        rdma_ports: 7100,7101
        device_ids: 0
        models: m
        transfer: {peer: [1, 2]}
        7: unknown keys may be anything
        """.replace("device_ids: 0", "device_ids: '0'")
    )
    instance = parse(entry, True).instance
    assert instance.fastdeploy is not None
    assert instance.fastdeploy.rdma_ports == ["7100", "7101"]
    assert instance.fastdeploy.device_ids == ["0"]
    assert json.loads(instance.transfer) == {"peer": [1, 2]}


def test_fastdeploys_example_file_loads_unchanged() -> None:
    entries, unusable = read_entries(Path(__file__).parents[2] / "fixtures" / "fastdeploy" / "register.yaml", True)
    assert unusable == []
    prefill, decode = [entry.instance for entry in entries]
    assert (prefill.url, prefill.role, prefill.metrics_url) == (
        "http://127.0.0.1:8097",
        Role.PREFILL,
        "http://127.0.0.1:8003/metrics",
    )
    expected = FastDeployFields(
        connector_port="8001",
        engine_worker_queue_port="8002",
        transfer_protocol=["ipc", "rdma"],
        rdma_ports=["7100", "7101"],
        device_ids=["0", "1"],
        metrics_port="8098",
    )
    assert (decode.role, decode.fastdeploy) == (Role.DECODE, expected)


@pytest.mark.parametrize("entry", [None, [], "http://h:1", 5])
def test_an_entry_that_is_no_mapping(entry: object) -> None:
    with pytest.raises(BadRegistration):
        parse(entry, False)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [*BASE, *FastDeployFields.__struct_fields__, "engine", "models", "capacity", "transfer", "load_endpoint"]


@given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.booleans())
def test_any_body_is_an_instance_or_a_bad_registration(fields: dict[str, object], splitwise: bool) -> None:
    with contextlib.suppress(BadRegistration):
        assert parse_body(json.dumps({**BASE, **fields}).encode(), splitwise).instance.url


# -- native engines ----------------------------------------------------------------------------------------------


def hello(**changes: Any) -> wire.EngineHello:
    fields: dict[str, Any] = {
        "protocol": wire.PROTOCOL,
        "incarnation": b"i" * 16,
        "endpoint": "tcp://10.0.0.2:7000",
        "role": Role.MIXED,
        "models": ["m"],
        "capacity": 8,
        "transfer": b"\x00\xff",
        "name": "engine one",
    }
    return wire.EngineHello(**{**fields, **changes})


def test_a_hello_is_an_instance() -> None:
    assert from_hello(hello(), False) == Instance(
        url="tcp://10.0.0.2:7000",
        engine=EngineKind.NATIVE,
        models=("m",),
        capacity=8,
        incarnation=b"i" * 16,
        transfer=b"\x00\xff",
        name="engine one",
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"incarnation": b"short"}, "incarnation"),
        ({"name": "x" * 65}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"endpoint": "tcp://*:7000"}, "endpoint"),
        ({"endpoint": "tcp://0.0.0.0:7000"}, "endpoint"),
        ({"endpoint": "tcp://[::]:7000"}, "endpoint"),
        ({"endpoint": "tcp://h:0"}, "endpoint"),
        ({"endpoint": "tcp://h"}, "endpoint"),
        ({"endpoint": "inproc://x"}, "endpoint"),
        ({"endpoint": "ipc://"}, "endpoint"),
        ({"endpoint": "ipc://a b"}, "endpoint"),
        ({"endpoint": ""}, "endpoint"),
        ({"role": Role.DECODE}, "role"),
        ({"capacity": -1}, "capacity"),
        ({"capacity": 1 << 40}, "capacity"),
        ({"transfer": b"x" * (wire.MAX_TRANSFER_BYTES + 1)}, "transfer"),
    ],
)
def test_a_bad_hello_names_the_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(BadRegistration) as caught:
        from_hello(hello(**changes), False)
    assert caught.value.param == field


@pytest.mark.parametrize("text", ["instances: [", "instances: [{port: 2024-13-45}]", "a: " + "[" * 3000, "\xff"])
def test_a_list_that_is_no_yaml_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "register.yaml"
    path.write_bytes(text.encode("latin-1"))
    entries, (unusable,) = read_entries(path, False)
    assert (entries, unusable.where, unusable.event) == ([], str(path), Event.LIST_MALFORMED)
