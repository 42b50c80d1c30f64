"""Sections 2.1, 2.4, 2.5: which routes there are, and what the management routes say."""

from __future__ import annotations

import pytest

from tests.blackbox.engine import refuse
from tests.blackbox.router import Router

PATHS = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/abort_requests": "POST",
    "/register": "POST",
    "/registered": "GET",
    "/registered_number": "GET",
    "/health_generate": "GET",
    "/metrics": "GET",
}


def test_unknown_paths_and_wrong_methods_are_404_in_plain_text(mixed: Router) -> None:
    unknown = ["/", "/health", "/ready", "/v1/models", "/v1/embeddings", "/v1/chat", "/registered/x", "/metrics/x"]
    asked = [(method, path) for path in unknown for method in ("GET", "POST")]
    asked += [
        (method, path)
        for path, own in PATHS.items()
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH")
        if method != own
    ]
    for method, path in asked:
        answer = mixed.ask(method, path, b"{}" if method in ("POST", "PUT", "PATCH") else None)
        said = b"" if method == "HEAD" else b"404 page not found"
        assert (answer.status, answer.body) == (404, said), (method, path)
        assert answer.headers["content-type"] == "text/plain"
        assert "allow" not in answer.headers


@pytest.mark.parametrize("path", PATHS)
def test_a_trailing_slash_is_redirected(mixed: Router, path: str) -> None:
    method = PATHS[path]
    answer = mixed.ask(method, path + "/?a=1", b"{}" if method == "POST" else None)
    assert answer.status == (301 if method == "GET" else 307)
    assert answer.headers["location"] == path + "?a=1"
    wrong = "POST" if method == "GET" else "GET"
    assert mixed.ask(wrong, path + "/").status == 404


def test_health_generate_asks_every_pair_instance_and_removes_nothing(pairs: Router) -> None:
    well, ill = pairs.engine("prefill"), pairs.engine("decode")
    ill.pages["/health"] = (500, b"")
    before = well.probes()
    answer = pairs.get("/health_generate")
    assert answer.status == 200
    assert answer.body == b'{"code":200,"msg":"Health check complete"}'
    assert well.probes() > before
    pairs.await_line(rf"\[INFO\] .*: Server {well.url} is healthy", "out")
    pairs.await_line(rf"\[WARN\] .*: Server {ill.url} is not healthy", "out")


def test_metrics_have_the_originals_names_labels_and_values(mixed: Router) -> None:
    text = mixed.get("/metrics")
    assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    for name in ("router_cache_hit_total", "router_cache_request_total"):
        assert mixed.metric(name) == {"": 0.0}
        assert f"# TYPE {name} counter" in text.body.decode()
    assert mixed.metric("http_requests_total") == {}
    engine = mixed.engine()
    assert engine.url not in text.body.decode()
    for _ in range(3):
        assert mixed.chat().status == 200
    for status in (429, 304, 418):
        engine.script = refuse(status)
        assert mixed.chat().status == status
    page = mixed.get("/metrics").body.decode()
    assert "# HELP inference_requests_total Total number of inference requests" in page
    assert "# TYPE inference_requests_total counter" in page
    counted = mixed.metric("inference_requests_total")
    labels = f'{{decode_worker="",mixed_worker="{engine.url}",prefill_worker="",status_code="%d"}}'
    assert {key: value for key, value in counted.items() if engine.url in key} == {
        labels % 200: 3.0,
        labels % 429: 1.0,
        labels % 304: 1.0,
        labels % 418: 1.0,
    }


def test_metrics_of_pairs_name_both(pairs: Router) -> None:
    prefill, decode = pairs.engine("prefill"), pairs.engine("decode")
    assert pairs.chat().status == 200
    labels = f'{{decode_worker="{decode.url}",mixed_worker="",prefill_worker="{prefill.url}",status_code="200"}}'
    assert pairs.metric("inference_requests_total")[labels] == 1.0


def test_a_request_that_no_engine_answered_is_not_counted(mixed: Router) -> None:
    engine = mixed.engine()
    engine.close()
    assert mixed.chat().status == 502
    assert not any(engine.url in labels for labels in mixed.metric("inference_requests_total"))
    mixed.engines.remove(engine)
