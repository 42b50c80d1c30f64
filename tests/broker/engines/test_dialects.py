"""Every dialect against what real engines sent, or what their sources say they send."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import wire
from broker.engines import DIALECTS, Evidence, recognise, sglang
from broker.engines.base import METRICS_PATH, MODELS_PATH, samples, total
from broker.engines.native import load_report
from broker.types import EngineKind, LoadReport, Trust

FIXTURES = Path(__file__).parents[2] / "fixtures"
VLLM = FIXTURES / "vllm" / "metrics_0.32.0.txt"
SGLANG = FIXTURES / "sglang" / "metrics.txt"
FASTDEPLOY = FIXTURES / "fastdeploy" / "metrics.txt"
LOAD_STATS = FIXTURES / "sglang" / "load_stat_0.5.23.jsonl"


def report(kind: EngineKind, text: bytes) -> LoadReport | None:
    return DIALECTS[kind].report(text)


def test_every_kind_has_a_dialect() -> None:
    assert set(DIALECTS) == set(EngineKind)


def test_vllm_captured_metrics() -> None:
    assert report(EngineKind.VLLM, VLLM.read_bytes()) == LoadReport(
        running=0, waiting=0, kv_permille=0, trust=Trust.APPROX
    )


def test_vllm_sums_its_ranks_and_takes_the_mean_of_their_use() -> None:
    text = b"""
vllm:num_requests_running{engine="0",model_name="a"} 3.0
vllm:num_requests_running{engine="1",model_name="a"} 4.0
vllm:num_requests_waiting{engine="0",model_name="a"} 1.0
vllm:num_requests_waiting{engine="1",model_name="a"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="a",reason="capacity"} 50.0
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.2
vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.4
"""
    assert report(EngineKind.VLLM, text) == LoadReport(running=7, waiting=3, kv_permille=300, trust=Trust.APPROX)


def test_vllm_before_0_10_named_its_kv_use_otherwise() -> None:
    text = b"vllm:num_requests_running 1.0\nvllm:num_requests_waiting 0.0\nvllm:gpu_cache_usage_perc 0.125\n"
    assert report(EngineKind.VLLM, text) == LoadReport(running=1, waiting=0, kv_permille=125, trust=Trust.APPROX)


def test_sglang_counts_a_rank_once_though_all_its_tensor_ranks_show_it() -> None:
    assert report(EngineKind.SGLANG, SGLANG.read_bytes()) == LoadReport(
        running=8, waiting=4, kv_permille=375, trust=Trust.APPROX
    )


def test_fastdeploy_tells_its_slots() -> None:
    assert report(EngineKind.FASTDEPLOY, FASTDEPLOY.read_bytes()) == LoadReport(
        running=7, waiting=2, kv_permille=375, capacity=64, trust=Trust.APPROX
    )


def test_fastdeploy_with_labels_and_without_a_use_of_its_own() -> None:
    text = b"""
fastdeploy:num_requests_running{model_id="x"} 1.0
fastdeploy:num_requests_waiting{model_id="x"} 0.0
fastdeploy:available_gpu_block_num{model_id="x"} 250.0
fastdeploy:max_gpu_block_num{model_id="x"} 1000.0
"""
    assert report(EngineKind.FASTDEPLOY, text) == LoadReport(running=1, waiting=0, kv_permille=750, trust=Trust.APPROX)


@pytest.mark.parametrize("kind", EngineKind)
def test_no_known_name_is_no_report(kind: EngineKind) -> None:
    assert report(kind, b"up 1\nhttp_requests_total 5\n") is None


# -- the scanner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"n 1", 1),
        (b"n 1.0", 1),
        (b"n\t2", 2),
        (b"n 3 1700000000000", 3),
        (b"n{} 4", 4),
        (b'n{a="b"} 5', 5),
        (b'n{a="b"}6', 6),
        (b'n{a="{x} 9"} 7', 7),
        (b'n{a="\\"q\\" , }"} 8', 8),
        (b"n 1e3", 1000),
        (b"n 9 # {trace_id=1", 9),
        (b"n 10\r", 10),
        (b"n NaN", None),
        (b"n +Inf", None),
        (b"n -1", None),
        (b"n 1e300", None),
        (b"n", None),
        (b"n ", None),
        (b"n x", None),
        (b'n{a="b" 5', None),
        (b"nn 5", None),
        (b"n_total 5", None),
        (b" n 5", None),
        (b"# HELP n 5", None),
        (b'm{of="n"} 5', None),
        (b"", None),
    ],
)
def test_a_line_of_prometheus_text(line: bytes, value: int | None) -> None:
    assert total(line, b"n") == value
    assert total(b"# TYPE n gauge\n" + line + b"\nother 77\n", b"n") == value


def test_one_bad_sample_does_not_spoil_the_others() -> None:
    assert total(b"n NaN\nn 2\nn garbage\nn 3\n", b"n") == 5


def test_labels_are_found_whole() -> None:
    (sample,) = samples(b'n{dp_rank="3",xdp_rank="4"} 1', b"n")
    assert (sample.label(b"dp_rank"), sample.label(b"xdp_rank"), sample.label(b"rank")) == (b"3", b"4", b"")


@given(st.binary(max_size=200), st.sampled_from(sorted(EngineKind)))
def test_garbage_never_raises(garbage: bytes, kind: EngineKind) -> None:
    names = b"\n".join([b"vllm:num_requests_running", b"sglang:num_running_reqs", b"fastdeploy:num_requests_running"])
    DIALECTS[kind].report(garbage)
    DIALECTS[kind].report(names + garbage)
    DIALECTS[kind].recognises(Evidence({MODELS_PATH: garbage, METRICS_PATH: garbage, "/server_info": garbage}))
    DIALECTS[kind].publishes(Evidence({"/server_info": garbage}), "h")


# -- recognition -------------------------------------------------------------------------------------------------


def models(owner: str) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": owner}]}).encode()


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ({MODELS_PATH: models("vllm")}, EngineKind.VLLM),
        ({MODELS_PATH: models("sglang")}, EngineKind.SGLANG),
        ({MODELS_PATH: models("FastDeploy")}, EngineKind.FASTDEPLOY),
        ({MODELS_PATH: models("me"), METRICS_PATH: VLLM.read_bytes()}, EngineKind.VLLM),
        ({MODELS_PATH: models("me"), METRICS_PATH: SGLANG.read_bytes()}, EngineKind.SGLANG),
        ({MODELS_PATH: models("me"), METRICS_PATH: FASTDEPLOY.read_bytes()}, EngineKind.FASTDEPLOY),
        ({METRICS_PATH: b"vllm:num_requests_running 0\n"}, EngineKind.VLLM),
        ({MODELS_PATH: models("me"), METRICS_PATH: b"about_vllm:x 1\n"}, EngineKind.OPENAI),
        ({MODELS_PATH: b"not json"}, EngineKind.OPENAI),
        ({}, None),
    ],
)
def test_a_server_is_recognised_by_its_marks(answers: dict[str, bytes], kind: EngineKind | None) -> None:
    assert recognise(Evidence(answers)) is kind


def test_a_captured_vllm_is_recognised_and_its_models_read() -> None:
    captured = json.loads((FIXTURES / "vllm" / "probe_0.32.0.json").read_text())
    evidence = Evidence({path: body.encode() for path, body in captured.items()})
    assert recognise(evidence) is EngineKind.VLLM
    assert evidence.models() == ("tiny",)


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'{"data":null}', b'{"data":[1]}', b'{"data":[{"id":5}]}', b'{"data":[{}]}', b"[" * 100_000],
)
def test_a_strange_list_of_models_names_none(body: bytes) -> None:
    assert Evidence({MODELS_PATH: body}).models() == ()


# -- pushed load -------------------------------------------------------------------------------------------------

_stat = msgspec.msgpack.Decoder(sglang.LoadStat)


def test_captured_load_stats() -> None:
    lines = [json.loads(line) for line in LOAD_STATS.read_text().splitlines()]
    reports = [sglang.load_report([_stat.decode(bytes.fromhex(m["frames"][2]))]) for m in lines if "frames" in m]
    assert len(reports) == 11
    assert reports[7] == LoadReport(running=8, waiting=2, waiting_tokens=200, kv_permille=391, capacity=8)
    assert reports[-1] == LoadReport(running=0, waiting=0, waiting_tokens=0, kv_permille=0, capacity=8)


def test_the_stable_prefix_of_a_load_stat_is_enough() -> None:
    stat = _stat.decode(msgspec.msgpack.encode(["LoadStat", 3, 1, 10, 0, 2]))
    assert stat.rank == 2
    assert sglang.load_report([stat]) == LoadReport(running=3, waiting=1)


def test_ranks_are_summed() -> None:
    stats = [sglang.LoadStat(1, 2, 100, 400, 0, 30, 0, 8), sglang.LoadStat(3, 4, 300, 400, 1, 50, 0, 8)]
    assert sglang.load_report(stats) == LoadReport(
        running=4, waiting=6, waiting_tokens=80, kv_permille=500, capacity=16
    )


@pytest.mark.parametrize(
    ("info", "endpoints"),
    [
        ({"kv_events": {"load_endpoint_port_base": 5600, "dp_size": 2}}, "tcp://h:5600,tcp://h:5601"),
        ({"kv_events": {"load_endpoint_port_base": 5600}}, "tcp://h:5600"),
        ({"kv_events": {"endpoint_port_base": 5557, "dp_size": 1}}, ""),
        ({"kv_events": None}, ""),
        ({}, ""),
        ({"kv_events": {"load_endpoint_port_base": 65535, "dp_size": 2}}, ""),
        ({"kv_events": {"load_endpoint_port_base": 0}}, ""),
        ({"kv_events": {"load_endpoint_port_base": 5600, "dp_size": 100000}}, ""),
        ({"kv_events": {"load_endpoint_port_base": "5600"}}, ""),
        ([], ""),
    ],
)
def test_sglang_says_where_it_publishes(info: object, endpoints: str) -> None:
    evidence = Evidence({"/server_info": json.dumps(info).encode()})
    assert DIALECTS[EngineKind.SGLANG].publishes(evidence, "h") == endpoints


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (wire.Load(b"i", 3, 2, 100, 250), LoadReport(running=3, waiting=2, waiting_tokens=100, kv_permille=250)),
        (wire.Load(b"i", 3, 2), LoadReport(running=3, waiting=2)),
        (wire.Load(b"i", -1, -1, -1, -1), LoadReport()),
        (wire.Load(b"i", 1 << 62, 0, 0, 5000), LoadReport(waiting=0, waiting_tokens=0, kv_permille=1000)),
    ],
)
def test_native_load(load: wire.Load, expected: LoadReport) -> None:
    assert load_report(load) == expected
