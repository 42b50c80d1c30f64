"""Sections 2.2, 2.3 and 3: what may register, in which words it is refused, and what is shown of it."""

from __future__ import annotations

import json
from typing import Any

from tests.blackbox.router import Router

BASE: dict[str, Any] = {"host_ip": "127.0.0.1", "port": 1}
SHAPE = "Invalid InstanceInfo JSON format: "
VALUE = "invalid InstanceInfo format:"
DEAD = "http://127.0.0.1:1 service is not healthy"
MISSING = object()


def mismatch(field: str, kind: str, wanted: str = "string") -> str:
    return f"{SHAPE}json: cannot unmarshal {kind} into Go struct field InstanceInfo.{field} of type {wanted}"


COMMON = [
    (b"", 400, SHAPE + "unexpected end of JSON input"),
    (b"{", 400, SHAPE + "unexpected end of JSON input"),
    (b"[]", 400, SHAPE + "json: cannot unmarshal array into Go value of type manager.InstanceInfo"),
    (b'"x"', 400, SHAPE + "json: cannot unmarshal string into Go value of type manager.InstanceInfo"),
    (b"nonsense", 400, SHAPE + "invalid character 'o' in literal null (expecting 'u')"),
    (b'{"role": mixed}', 400, SHAPE + "invalid character 'm' looking for beginning of value"),
    (b'{"role": "mixed",}', 400, SHAPE + "invalid character '}' looking for beginning of object key string"),
    (b'{"role": "mixed"} x', 400, SHAPE + "invalid character 'x' after top-level value"),
    (b"null", 400, VALUE + "role is required"),
    (b"{}", 400, VALUE + "role is required"),
    ({"role": MISSING}, 400, VALUE + "role is required"),
    ({"role": ""}, 400, VALUE + "invalid role: "),
    ({"role": 7}, 400, SHAPE + "invalid role integer: 7"),
    ({"role": -1}, 400, SHAPE + "invalid role integer: -1"),
    ({"role": 1.5}, 400, mismatch("role", "number")),
    ({"role": 10**30}, 400, mismatch("role", "number")),
    ({"role": True}, 400, mismatch("role", "bool")),
    ({"role": []}, 400, mismatch("role", "array")),
    ({"role": {}}, 400, mismatch("role", "object")),
    ({"role": "both"}, 400, VALUE + "invalid role: both"),
    ({"role": " mixed"}, 400, VALUE + "invalid role:  mixed"),
    ({"host_ip": MISSING}, 400, VALUE + "host_ip is required"),
    ({"host_ip": ""}, 400, VALUE + "host_ip is required"),
    ({"host_ip": None}, 400, VALUE + "host_ip is required"),
    ({"host_ip": 5}, 400, mismatch("host_ip", "number")),
    ({"host_ip": "256.1.1.1"}, 400, VALUE + "invalid host_ip: 256.1.1.1"),
    ({"host_ip": "1.2.3"}, 400, VALUE + "invalid host_ip: 1.2.3"),
    ({"host_ip": "127.0.0.1:80"}, 400, VALUE + "invalid host_ip: 127.0.0.1:80"),
    ({"host_ip": " 127.0.0.1"}, 400, VALUE + "invalid host_ip:  127.0.0.1"),
    ({"host_ip": "ftp://127.0.0.1"}, 400, VALUE + "invalid host_ip: ftp://127.0.0.1"),
    ({"host_ip": "<a b>"}, 400, VALUE + "invalid host_ip: <a b>"),
    ({"port": MISSING}, 400, VALUE + "port is required"),
    ({"port": ""}, 400, VALUE + "port is required"),
    ({"port": 0}, 400, VALUE + "invalid port: 0"),
    ({"port": None}, 400, VALUE + "invalid port: 0"),
    ({"port": 65536}, 400, VALUE + "invalid port: 65536"),
    ({"port": "-1"}, 400, VALUE + "invalid port: -1"),
    ({"port": "http"}, 400, VALUE + "invalid port: http"),
    ({"port": 80.5}, 400, mismatch("port", "number")),
    ({"port": 80.0}, 400, mismatch("port", "number")),
    ({"port": True}, 400, mismatch("port", "bool")),
    ({"port": [80]}, 400, mismatch("port", "array")),
    ({"connector_port": 1.5}, 400, mismatch("connector_port", "number")),
    ({"engine_worker_queue_port": {}}, 400, mismatch("engine_worker_queue_port", "object")),
    ({"transfer_protocol": "ipc"}, 400, mismatch("transfer_protocol", "string", "[]string")),
    ({"transfer_protocol": [1]}, 400, mismatch("transfer_protocol", "number")),
    ({"transfer_protocol": [None]}, 400, VALUE + "invalid protocol: "),
    ({"transfer_protocol": ["tcp"]}, 400, VALUE + "invalid protocol: tcp"),
    ({"transfer_protocol": ["ipc", "IPC"]}, 400, VALUE + "invalid protocol: IPC"),
    ({"rdma_ports": "7100"}, 400, mismatch("rdma_ports", "string", "[]interface {}")),
    ({"rdma_ports": 7100}, 400, mismatch("rdma_ports", "number", "[]interface {}")),
    ({"rdma_ports": [1.5]}, 400, SHAPE + "element 0: 1.5 not integer"),
    ({"rdma_ports": [1, 1e20]}, 400, SHAPE + "element 1: 1e+20 not integer"),
    ({"device_ids": {}}, 400, mismatch("device_ids", "object", "[]interface {}")),
    ({"device_ids": [0, None]}, 400, SHAPE + "element 1: type <nil> unsupported"),
    ({"device_ids": [True]}, 400, SHAPE + "element 0: type bool unsupported"),
    ({"device_ids": [[]]}, 400, SHAPE + "element 0: type []interface {} unsupported"),
    ({"device_ids": [{}]}, 400, SHAPE + "element 0: type map[string]interface {} unsupported"),
    ({"metrics_port": 0}, 400, VALUE + "invalid metrics_port: 0"),
    ({"metrics_port": "x"}, 400, VALUE + "invalid metrics_port: x"),
    ({"metrics_port": 65536}, 400, VALUE + "invalid metrics_port: 65536"),
    ({"metrics_port": 1.5}, 400, mismatch("metrics_port", "number")),
    ({"tp_size": "2"}, 400, mismatch("tp_size", "string", "int")),
    ({"tp_size": 1.5}, 400, mismatch("tp_size", "number 1.5", "int")),
    ({"tp_size": True}, 400, mismatch("tp_size", "bool", "int")),
    # The original's order: types before values, role before host before port.
    ({"role": "both", "port": []}, 400, mismatch("port", "array")),
    ({"role": "both", "host_ip": "", "port": 0}, 400, VALUE + "invalid role: both"),
    ({"host_ip": "", "port": 0}, 400, VALUE + "host_ip is required"),
    ({"port": 0, "transfer_protocol": ["tcp"]}, 400, VALUE + "invalid port: 0"),
    ({"metrics_port": 0, "transfer_protocol": ["tcp"]}, 400, VALUE + "invalid protocol: tcp"),
    # Accepted, so that the probe is what fails.
    ({"port": "1", "metrics_port": "", "is_paused": True, "version": None, "connected_decodes": [{}]}, 503, DEAD),
    ({"host_ip": "http://127.0.0.1"}, 503, DEAD),
    ({"host_ip": "https://127.0.0.1"}, 503, "https://127.0.0.1:1 service is not healthy"),
    ({"rdma_ports": None, "device_ids": None, "tp_size": None, "transfer_protocol": None}, 503, DEAD),
    ({"connector_port": None, "engine_worker_queue_port": None, "device_ids": [0, "1", 2.0]}, 503, DEAD),
    ({"rdma_ports": [], "device_ids": ["gpu"], "tp_size": -1, "transfer_protocol": []}, 503, DEAD),
    # Refused by the original, and useful.
    ({"metrics_port": None}, 503, DEAD),
    ({"host_ip": "::1"}, 503, "http://[::1]:1 service is not healthy"),
    ({"host_ip": "no-such-host.invalid"}, 503, "http://no-such-host.invalid:1 service is not healthy"),
]
IN_MIXED = [
    ({"role": "prefill"}, 400, "only MIXED instances are allowed"),
    ({"role": 2}, 400, "only MIXED instances are allowed"),
    ({"role": "prefill", "metrics_port": 0}, 400, VALUE + "invalid metrics_port: 0"),
    ({"role": None}, 503, DEAD),
    ({"role": "MiXeD"}, 503, DEAD),
    ({"role": 0}, 503, DEAD),
    ({"connector_port": 99999, "engine_worker_queue_port": "x", "rdma_ports": [0]}, 503, DEAD),
]
IN_PAIRS = [
    ({"role": "mixed"}, 400, "splitwise mode only supports PREFILL/DECODE instances"),
    ({"role": None}, 400, "splitwise mode only supports PREFILL/DECODE instances"),
    ({"role": "Decode"}, 503, DEAD),
    ({"role": 1}, 503, DEAD),
    ({"connector_port": 99999}, 400, VALUE + "invalid connector_port: 99999"),
    ({"connector_port": 0}, 400, VALUE + "invalid connector_port: 0"),
    ({"connector_port": "x"}, 400, VALUE + "invalid connector_port: x"),
    ({"connector_port": "", "engine_worker_queue_port": ""}, 503, DEAD),
    ({"engine_worker_queue_port": -1}, 400, VALUE + "invalid engine_worker_queue_port: -1"),
    ({"rdma_ports": [7100, "70000"]}, 400, VALUE + "rdma_ports[1] invalid port: 70000"),
    ({"rdma_ports": ["x"], "transfer_protocol": ["tcp"]}, 400, VALUE + "invalid protocol: tcp"),
]


def check(router: Router, role: str, fields: Any, status: int, said: str) -> None:
    if isinstance(fields, bytes):
        body = fields
    else:
        merged = {"role": role, **BASE, **fields}
        body = json.dumps({key: value for key, value in merged.items() if value is not MISSING}).encode()
    answer = router.post("/register", body)
    assert answer.status == status, (body, answer.body)
    found = answer.json()
    assert (list(found), found["code"]) == (["code", "msg"], status)
    assert found["msg"] == said, (body, found)
    assert answer.headers["content-type"] == "application/json; charset=utf-8"


def test_every_refusal_has_its_words_in_mixed_mode(mixed: Router) -> None:
    for case in (*COMMON, *IN_MIXED):
        check(mixed, "mixed", *case)


def test_every_refusal_has_its_words_in_splitwise_mode(pairs: Router) -> None:
    for case in (*COMMON, *IN_PAIRS):
        check(pairs, "prefill", *case)


def test_management_json_is_compact_and_escaped_as_go_does_it(mixed: Router) -> None:
    refused = mixed.post("/register", {"role": "mixed", "host_ip": "<&>", "port": 1})
    assert refused.body == b'{"code":400,"msg":"invalid InstanceInfo format:invalid host_ip: \\u003c\\u0026\\u003e"}'
    assert mixed.get("/registered_number").body == b'{"decode":0,"mixed":0,"prefill":0}'
    assert mixed.get("/registered").body == b'{"code":200,"decode":[],"mixed":[],"msg":"success","prefill":[]}'


def test_what_is_registered_is_shown_with_nulls_for_what_was_not_sent(mixed: Router) -> None:
    engine = mixed.engine()
    answer = mixed.register(engine)
    assert answer.body == b'{"code":200,"msg":"Register success"}'
    assert mixed.numbers() == {"decode": 0, "mixed": 1, "prefill": 0}
    fields = (
        f'"url":"{engine.url}","worker_type":"mixed","connector_port":"","engine_worker_queue_port":"",'
        f'"transfer_protocol":null,"rdma_ports":null,"device_ids":null,"metrics_port":"{engine.port}","tp_size":0'
    )
    expected = f'{{"code":200,"decode":[],"mixed":[{{{fields}}}],"msg":"success","prefill":[]}}'
    assert mixed.get("/registered").body.decode() == expected


def test_what_a_fastdeploy_engine_sends_registers_and_is_replaced_as_a_whole(pairs: Router) -> None:
    fields = {
        "metrics_port": "8190",
        "connector_port": None,
        "engine_worker_queue_port": "8189",
        "rdma_ports": [7100, "7101", 7102.0],
        "device_ids": [0, "1"],
        "transfer_protocol": ["ipc", "rdma"],
        "tp_size": 2,
        "is_paused": False,
        "version": "7",
        "connected_decodes": [{"host_ip": "10.0.0.1"}],
    }
    engine = pairs.engine("prefill", **fields)
    (entry,) = pairs.registered()["prefill"]
    assert entry == {
        "url": engine.url,
        "worker_type": "prefill",
        "connector_port": "0",
        "engine_worker_queue_port": "8189",
        "transfer_protocol": ["ipc", "rdma"],
        "rdma_ports": ["7100", "7101", "7102"],
        "device_ids": ["0", "1"],
        "metrics_port": "8190",
        "tp_size": 2,
    }
    engine.registration = {"role": "DECODE", "host_ip": "127.0.0.1", "port": str(engine.port), "rdma_ports": None}
    assert pairs.register(engine).status == 200
    assert pairs.numbers() == {"decode": 1, "mixed": 0, "prefill": 0}
    (entry,) = pairs.registered()["decode"]
    assert (entry["rdma_ports"], entry["device_ids"], entry["tp_size"]) == ([], None, 0)
    assert entry["metrics_port"] == str(engine.port)
    (shown,) = pairs.get("/decode_instances").json()
    assert (shown["role"], shown["host_ip"], shown["port"]) == ("DECODE", "127.0.0.1", engine.port)
