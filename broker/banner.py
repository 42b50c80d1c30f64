"""What `penstock serve` prints once it is ready."""

from __future__ import annotations

import importlib.metadata
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from broker import lease
from broker.config import Config


def version() -> str:
    return importlib.metadata.version("penstock")


def is_compiled() -> bool:
    """Whether the request path is: all of it or nothing (setup.py)."""
    return str(lease.__file__).endswith(tuple(EXTENSION_SUFFIXES))


def url(settings: Config) -> str:
    """Where this machine reaches the frontends: the wildcard addresses become loopback."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(settings.server.host, settings.server.host)
    return _url(host, settings.server.port)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def text(settings: Config, run_dir: Path, simulated: int) -> str:
    server, scheduler = settings.server, settings.scheduler
    if server.splitwise:
        policy = f"{scheduler.prefill_policy} (prefill), {scheduler.decode_policy} (decode)"
    else:
        policy = scheduler.policy
    if simulated:
        engines = f"{simulated} simulated ones are being started (asked for by --sim; they answer with made-up words)"
    elif settings.manager.register_path:
        engines = f"from {settings.manager.register_path}, and by POST /register"
    else:
        engines = "none yet; POST /register, or start one with: penstock sim --router " + url(settings)
    name = f" {server.name}" if server.name else ""
    # `--port` alone means 127.0.0.1, where a server that was given another address does not listen.
    is_at_loopback = url(settings) == _url("127.0.0.1", server.port)
    here = f"--port {server.port}" if is_at_loopback else f"--url {url(settings)}"
    lines = [
        f"Penstock {version()}{name}",
        f"  listening on   {_url(server.host, server.port)}",
        f"  frontends      {server.workers}, {'compiled' if is_compiled() else 'not compiled'}",
        f"  policy         {policy}",
        f"  instances      {engines}",
        f"  shared memory  {run_dir}   (look inside: python -m shm {run_dir})",
        "",
        "  Try it:",
        f"    curl {url(settings)}/v1/chat/completions -H 'Content-Type: application/json' \\",
        """      -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'""",
        f"    penstock instances {here}",
    ]
    return "\n".join(lines)


def show(settings: Config, run_dir: Path, simulated: int) -> None:
    """Also when the log goes to a file: a person who starts a server wants to see that it runs."""
    print(f"\n{text(settings, run_dir, simulated)}\n", file=sys.stdout, flush=True)
