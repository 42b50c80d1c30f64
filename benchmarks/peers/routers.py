"""The routers that are compared: how each is configured and started. `$name`s are filled in by `Launch`."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from benchmarks.peers import prompts
from benchmarks.peers.engines import Engines, HttpEngines, NativeEngines
from benchmarks.peers.http import answers, post
from benchmarks.peers.install import INSTALLED
from benchmarks.peers.process import Children, Condition, free_ports, wait_until

ROOT = Path(__file__).parents[2]
READY_S = 60.0
"""A router that does not answer a request within this time is left out, with the end of its log."""


@dataclass(frozen=True)
class Router:
    name: str
    command: tuple[str, ...]
    """Empty: no router, the load goes straight to an engine."""
    family: str = ""
    """What `install` reports as missing under this name makes the router unavailable."""
    files: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    registers: bool = False
    """FastDeploy's way: engines are announced by POST /register."""
    native: bool = False
    """Its engines speak Penstock's native protocol."""
    cache: bool = False
    """Has a cache-aware policy: it runs in the cache scenario and in no other."""
    baseline: bool = False
    """Runs in every scenario."""
    ours: bool = False

    def suits(self, cache_scenario: bool) -> bool:
        return self.baseline or self.cache == cache_scenario


NGINX = """\
worker_processes $workers; pid $dir/pid; error_log $dir/err warn; worker_rlimit_nofile 20000; daemon off;
events { worker_connections 16384; multi_accept on; }
http {
  access_log off; tcp_nodelay on; keepalive_timeout 3600; keepalive_requests 1000000000;
  client_body_buffer_size 128k; client_max_body_size 512m;
  client_body_temp_path $dir/b; proxy_temp_path $dir/p; fastcgi_temp_path $dir/f;
  uwsgi_temp_path $dir/u; scgi_temp_path $dir/s;
  upstream engines { $servers keepalive 1024; keepalive_requests 1000000000; keepalive_timeout 3600; }
  server {
    listen 127.0.0.1:$port backlog=4096;
    location / {
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering on; proxy_read_timeout 3600;
    }
  }
}
"""

FASTDEPLOY = """\
server: {port: "$port", host: 127.0.0.1, mode: release, splitwise: false}
scheduler: {policy: $policy, waiting-weight: 10}
manager:
  health-failure-threshold: 3
  health-success-threshold: 2
  health-check-timeout-secs: 5
  health-check-interval-secs: 5
  health-check-endpoint: /health
log: {level: error, output: file}
"""

PENSTOCK = """\
server: {splitwise: false}
scheduler: {policy: $policy}
log: {level: info, output: file}
upstream: {connections: 4096}
"""
"""Everything on: one log line per request is part of the duty. 5,000 open streams on 4 engines need the connections."""


def _rust(name: str, program: str, policy: str) -> Router:
    return Router(
        name,
        (
            *(f"$installed/{program}.venv/bin/{program}", *(("launch",) if program == "sglang-router" else ())),
            *(
                "--host",
                "127.0.0.1",
                "--port",
                "$port",
                "--prometheus-host",
                "127.0.0.1",
                "--prometheus-port",
                "$port2",
            ),
            *("--log-level", "error", "--worker-startup-check-interval", "1", "--policy", policy),
            *("--worker-urls", "$urls"),
        ),
        family=program,
        env={"TOKIO_WORKER_THREADS": "$workers"},
        cache=policy == "cache_aware",
    )


def _fd(name: str, policy: str) -> Router:
    return Router(
        name,
        ("$fd_router", "-config_path", "$dir/config.yaml", "-port", "$port"),
        family="fd-router",
        files={"config.yaml": FASTDEPLOY.replace("$policy", policy)},
        env={"GOMAXPROCS": "$workers"},
        registers=True,
        cache=policy == "cache_aware",
    )


def _penstock(name: str, policy: str, *, native: bool = False) -> Router:
    return Router(
        name,
        (
            *("$root/.venv/bin/penstock", "serve", "--host", "127.0.0.1", "--port", "$port"),
            *("--workers", "$workers", "--config_path", "$dir/config.yaml"),
        ),
        family="penstock",
        files={"config.yaml": PENSTOCK.replace("$policy", policy)},
        registers=not native,
        native=native,
        cache=policy == "cache_aware",
        ours=True,
    )


ROUTERS = {
    r.name: r
    for r in (
        Router("direct", (), baseline=True),
        Router("nginx", ("$installed/nginx", "-c", "$dir/nginx.conf", "-p", "$dir", "-e", "$dir/err"), "nginx",
               {"nginx.conf": NGINX}, baseline=True),
        _rust("sgl-rr", "sglang-router", "round_robin"),
        _rust("vllmr-rr", "vllm-router", "round_robin"),
        _fd("fd-rr", "round_robin"),
        _penstock("penstock-rr", "round_robin"),
        _penstock("penstock-rn", "request_num"),
        _penstock("penstock-zmq", "request_num", native=True),
        _rust("sgl-cache", "sglang-router", "cache_aware"),
        _rust("vllmr-cache", "vllm-router", "cache_aware"),
        _fd("fd-cache", "cache_aware"),
        _penstock("penstock-cache", "cache_aware"),
        _penstock("penstock-zmq-cache", "cache_aware", native=True),
    )
}  # fmt: skip


class Launch:
    """One started router, ready to answer. Raises RuntimeError, OSError or TimeoutError when it does not get there."""

    def __init__(
        self,
        router: Router,
        workers: int,
        core: int | None,
        children: Children,
        http: HttpEngines,
        engine_core: int | None,
        folder: Path,
    ) -> None:
        self.router = router
        self.workers = workers
        self.label = router.name if workers == 1 else f"{router.name}@{workers}"
        self.process: subprocess.Popen[str] | None = None
        self.idle_private_kib = 0
        """What it held before its first load; set once it has settled."""
        self.engines: Engines = http
        self.command: list[str] = []
        self.files: dict[str, str] = {}
        if not router.command:
            self.port = http.first_port
            return
        self.port = free_ports()
        folder = folder / self.label
        folder.mkdir(parents=True)
        names = {
            "port": str(self.port),
            "port2": str(free_ports()),
            "workers": str(workers),
            "dir": str(folder),
            "installed": str(INSTALLED),
            "root": str(ROOT),
            "fd_router": os.environ.get("FD_ROUTER", ""),
            "servers": " ".join(f"server 127.0.0.1:{p};" for p in http.ports),
        }
        for item in router.command:
            self.command += http.urls if item == "$urls" else [Template(item).substitute(names)]
        for name, text in router.files.items():
            self.files[name] = Template(text).substitute(names)
            (folder / name).write_text(self.files[name])
        env = {k: Template(v).substitute(names) for k, v in router.env.items()}
        self._log = folder / "log"
        self.process = children.start(self.command, core=core, log=self._log, env=env, cwd=folder)
        try:
            self._bring_up(children, http, engine_core, folder)
        except BaseException:
            children.stop(self.process)  # what is left out must not use the machine either
            raise

    def _bring_up(self, children: Children, http: HttpEngines, engine_core: int | None, folder: Path) -> None:
        if self.router.registers or self.router.native:
            self._wait("it listens", lambda: answers(f"{self.base}/health", any_status=True))
        if self.router.registers:
            self._wait("it takes its engines", lambda: all(self._registers(port) for port in http.ports))
        if self.router.native:
            self.engines = NativeEngines(children, engine_core, self.base, folder / "engine.log")
        self._wait("it answers a request", self._answers)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _registers(self, port: int) -> bool:
        form = {"role": "mixed", "host_ip": "127.0.0.1", "port": str(port), "metrics_port": str(port)}
        if self.router.ours:
            form["engine"] = "openai"
        return self._accepts("/register", json.dumps(form).encode())

    def _answers(self) -> bool:
        return self._accepts("/v1/chat/completions", prompts.one(1024, stream=False)[0])

    def _accepts(self, path: str, body: bytes) -> bool:
        try:
            post(f"{self.base}{path}", body)
        except OSError:
            return False
        return True

    def _wait(self, what: str, met: Condition) -> None:
        def met_or_dead() -> bool:
            if self.process and self.process.poll() is not None:
                raise RuntimeError(f"it ended with {self.process.returncode}: {self._log.read_text()[-400:]}")
            return met()

        try:
            wait_until(what, READY_S, met_or_dead)
        except TimeoutError as e:
            raise RuntimeError(f"{e}; its log ends: {self._log.read_text()[-400:]}") from e
