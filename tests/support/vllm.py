"""Starts a real vLLM (CPU build, tiny random model) as a process of a test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import urllib.request
from pathlib import Path

import psutil

HERE = Path(__file__).parent
MODEL = "tiny"


def missing(venv: str | None) -> str | None:
    """Why a real vLLM cannot be started here, None when it can."""
    if not venv:
        return "VLLM_VENV names no virtual environment; tests/e2e/install_vllm.sh makes one"
    if not (Path(venv) / "bin" / "vllm").exists():
        return f"there is no vLLM in {venv}; tests/e2e/install_vllm.sh makes one"
    return None


def make_model(venv: str, folder: Path) -> Path:
    """A tiny model; its weights are drawn by the engine, the same for every engine (`--load-format dummy`)."""
    model = folder / "model"
    subprocess.run([f"{venv}/bin/python", str(HERE / "tiny_model.py"), str(model)], check=True)
    return model


def start(
    venv: str,
    folder: Path,
    port: int,
    events_port: int,
    *,
    kv_role: str = "",
    side_port: int = 0,
    model: Path | None = None,
) -> subprocess.Popen[bytes]:
    """An engine of 40 blocks of 32 tokens; its log goes to `folder`/vllm.log.

    `kv_role`: `producer` or `consumer` makes it one half of a NIXL pair over TCP, with its side channel on `side_port`.
    Halves need one `model` for both: its path is part of what NIXL compares before it transfers anything.
    """
    model = model or make_model(venv, folder)
    environment = {
        **os.environ,
        "PATH": f"{venv}/bin:{os.environ['PATH']}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    events = f'{{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:{events_port}"}}'
    arguments = ["--served-model-name", MODEL, "--load-format", "dummy", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "512", "--block-size", "32", "--num-gpu-blocks-override", "40"]
    arguments += ["--max-num-seqs", "8", "--host", "127.0.0.1", "--port", str(port), "--kv-events-config", events]
    if kv_role:
        environment |= {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
            "UCX_TLS": "tcp",
        }
        transfer = {"kv_connector": "NixlConnector", "kv_role": f"kv_{kv_role}", "kv_buffer_device": "cpu"}
        arguments += ["--kv-transfer-config", json.dumps(transfer)]
    with (folder / "vllm.log").open("wb") as log:
        return subprocess.Popen(
            ["nice", f"{venv}/bin/vllm", "serve", str(model), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its helper processes end with its group
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends an engine and its helpers."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(children, timeout=20)
    for child in left:
        child.kill()
    process.wait(30)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to an engine and its helpers, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def is_up(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
