"""An HTTP engine for tests: answers what it is told to, and counts who asked. Runs in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from tests.support.waiting import PATIENCE_S


class FakeEngine:
    """`answers`: path -> (status, body). Whatever is not listed is a 404."""

    def __init__(self, answers: dict[str, tuple[int, bytes]], port: int = 0) -> None:
        self.answers = answers
        self.asked: Counter[str] = Counter()
        self.release = threading.Event()
        """Cleared: every answer waits."""
        self.release.set()
        engine = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                engine.asked[self.path] += 1
                engine.release.wait(PATIENCE_S)
                status, body = engine.answers.get(self.path, (404, b"{}"))
                with contextlib.suppress(ConnectionError):  # who asked may have left
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


VLLM_METRICS = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
"""


def vllm() -> dict[str, tuple[int, bytes]]:
    """A healthy vLLM that serves `tiny`."""
    return {
        "/health": (200, b""),
        "/v1/models": (200, b'{"object":"list","data":[{"id":"tiny","owned_by":"vllm"}]}'),
        "/metrics": (200, VLLM_METRICS),
    }
