"""Starts a real vLLM (CPU build, tiny random model) as a process of a test."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
MODEL = "tiny"


def missing(venv: str | None) -> str | None:
    """Why a real vLLM cannot be started here, None when it can."""
    if not venv:
        return "VLLM_VENV names no virtual environment; tests/e2e/install_vllm.sh makes one"
    if not (Path(venv) / "bin" / "vllm").exists():
        return f"there is no vLLM in {venv}; tests/e2e/install_vllm.sh makes one"
    return None


def start(venv: str, folder: Path, port: int, events_port: int) -> subprocess.Popen[bytes]:
    """An engine of 40 blocks of 32 tokens; its log goes to `folder`/vllm.log."""
    model = folder / "model"
    subprocess.run([f"{venv}/bin/python", str(HERE / "tiny_model.py"), str(model)], check=True)
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
    with (folder / "vllm.log").open("wb") as log:
        return subprocess.Popen(
            ["nice", f"{venv}/bin/vllm", "serve", str(model), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its helper processes end with its group
        )


def is_up(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
