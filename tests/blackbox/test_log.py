"""Section 10: the lines of the log, as upstream's scripts look for them."""

from __future__ import annotations

import re
from pathlib import Path

from tests.blackbox.router import Router
from tests.support.processes import free_port
from tests.support.waiting import until

HEAD = r"\[(DEBUG|INFO|WARN|ERROR)\] \d{4}/\d\d/\d\d \d\d:\d\d:\d\d logger\.go:\d+: "
GO_DURATION = r"(\d+h)?(\d+m)?\d+(\.\d+)?(ns|µs|ms|s)"
SECRET = "nobody may read this"


def test_a_request_is_told_with_its_tags_in_their_order(mixed: Router) -> None:
    engine = mixed.engine()
    body = {"req_id": "q1", "session_id": "", "extra_body": {"session_id": "s1"}}
    assert mixed.chat(SECRET, {"X_BD_LOGID": "t1"}, **body).status == 200
    own = r"\[INFO\] .*: \[trace_id:t1\] \[req_id:q1\] \[session_id:s1\] "
    for line in (
        r"Parsing completed; starting worker selection\.",
        rf"select worker \(mixed\): {engine.url}, count: 1",
        rf"release worker: {engine.url}, count: 0",
        rf"release prefill tokens: {engine.url}, tokens: 0",
        r"Request completed successfully\.",
        rf"\[POST\] /v1/chat/completions HTTP/1\.1 200 {GO_DURATION} 127\.0\.0\.1",
    ):
        mixed.await_line(own + line, "out")
    mixed.get("/registered")
    mixed.await_line(rf"\[INFO\] .*: \[GET\] /registered HTTP/1\.1 200 {GO_DURATION} 127\.0\.0\.1", "out")
    assert SECRET not in mixed.log


def test_every_request_is_told_whether_it_is_served_or_not(mixed: Router) -> None:
    """Operators look for clients that ask for what is not there."""
    for method, path, status in (
        ("GET", "/v1/models", 404),
        ("POST", "/v1/embeddings", 404),
        ("DELETE", "/v1/chat/completions", 404),
        ("OPTIONS", "/", 404),
        ("GET", "/registered?all=1", 200),
        ("GET", "/metrics", 200),
        ("POST", "/v1/chat/completions?own=2", 502),
        ("POST", "/v1/abort_requests", 400),
        ("POST", "/register", 400),
    ):
        assert mixed.ask(method, path, b"{}" if method == "POST" else None).status == status
        line = rf"\[{method}\] {re.escape(path)} HTTP/1\.1 {status} {GO_DURATION} 127\.0\.0\.1"
        mixed.await_line(rf"\[INFO\] .*: {line}", "out")


def test_what_clients_call_themselves_cannot_forge_a_line(mixed: Router) -> None:
    mixed.engine()
    assert (
        mixed.chat(req_id="x\n[ERROR] 2026/01/01 00:00:00 logger.go:1: forged %s %d", session_id="é" * 500).status
        == 200
    )
    mixed.await_line(r"\[INFO\] .*: \[req_id:x\?\[ERROR\]\?2026/01/01\?.*\] \[session_id:\?{128}\] .*", "out")


def test_every_line_has_the_form_and_goes_where_its_level_belongs(mixed: Router) -> None:
    engine = mixed.engine()
    engine.close()
    assert mixed.chat().status == 502
    mixed.await_line(r"\[ERROR\] .*: failed to send request to http://.*/health with error: .*", "err")
    mixed.await_line(r"\[DEBUG\] .*: Healthy instances: prefill=\[\], decode=\[\], mixed=\[.*\]", "out")
    mixed.await_line(
        r"\[INFO\] .*: \[stats\] total_running=\d+, workers: \[.*\], cache_hit_rate=0\.00% \(hits=0/total=0\)", "out"
    )
    mixed.engines.remove(engine)
    for text, levels in ((mixed.out, "DEBUG|INFO|WARN"), (mixed.err, "ERROR")):
        strange = [
            line for line in text.splitlines() if not re.match(HEAD.replace("DEBUG|INFO|WARN|ERROR", levels), line)
        ]
        assert strange == []


def test_file_mode_and_level(tmp_path: Path) -> None:
    config = {"log": {"output": "file", "level": "warn"}}
    with Router(tmp_path, "-port", str(port := free_port()), config=config, port=port) as router:
        assert router.chat().status == 502
        file = tmp_path / "logs" / "router.log"
        text = until(file.read_text, "the line")
        assert re.fullmatch(rf"{HEAD}Failed to select mixed worker: no healthy workers available\n", text)
        assert router.log == ""
