"""Brings in what the comparison needs, each thing at most once: the C tools, the Rust routers, nginx.

Everything lands in `installed/` beside this file, which git ignores. What cannot be had is left out with its reason;
the run then goes on without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
Action = Callable[[], None]

INSTALLED = HERE / "installed"
TOOLS = HERE / "tools"

PEERS = {
    "sglang-router": "sglang-router==0.3.2",
    "vllm-router": "vllm-router==0.1.17",
}
"""Venv -> what pip installs into it. Each has one of its own: their dependencies must not meet ours or each other's."""

LIBRARIES = {"http_engine": (), "native_engine": ("-lzmq",), "loadgen": ()}
CFLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


class Unavailable(Exception):
    """Something cannot be installed here; the text is the reason."""


def install() -> dict[str, str]:
    """Installs everything. Returns name -> reason of what is missing; only the load generator and the HTTP engine are
    indispensable: without them it raises `Unavailable`."""
    INSTALLED.mkdir(exist_ok=True)
    missing: dict[str, str] = {}
    for tool in ("loadgen", "http_engine"):
        build(tool)
    for name, action in {"native_engine": _native_engine, "nginx": _nginx, **{n: _peer(n) for n in PEERS}}.items():
        try:
            action()
        except Unavailable as e:
            missing[name] = str(e)
    return missing


def tool(name: str) -> str:
    return str(INSTALLED / name)


def build(name: str) -> None:
    """Compiles one of the C tools, unless it is newer than its sources. Raises `Unavailable`."""
    INSTALLED.mkdir(exist_ok=True)
    target, source = INSTALLED / name, TOOLS / f"{name}.c"
    newest = max(f.stat().st_mtime for f in (source, *TOOLS.glob("*.h")))
    if not target.exists() or target.stat().st_mtime < newest:
        _run("gcc", *CFLAGS, "-o", str(target), str(source), *LIBRARIES[name])


def _native_engine() -> None:
    if not Path("/usr/include/zmq.h").exists():
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise Unavailable("needs the header of libzmq (Debian: libzmq3-dev), and only root can install it")
        _run("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", "libzmq3-dev")
    build("native_engine")


def _nginx() -> None:
    """One from the system, else Debian's package, unpacked but not installed: installing it would start a service."""
    target = INSTALLED / "nginx"
    if target.exists():
        return
    if system := shutil.which("nginx"):
        target.symlink_to(system)
        return
    if not shutil.which("apt-get"):
        raise Unavailable("there is no nginx here and no apt-get to fetch it with")
    with tempfile.TemporaryDirectory() as folder:
        _run("apt-get", "download", "--quiet", "nginx", cwd=folder)
        package = next(Path(folder).glob("nginx_*.deb"))
        _run("dpkg-deb", "-x", package.name, "unpacked", cwd=folder)
        binary = Path(folder) / "unpacked/usr/sbin/nginx"
        _run(str(binary), "-v")  # its libraries may be missing
        shutil.copy2(binary, target)


def _peer(name: str) -> Action:
    def install_peer() -> None:
        venv = INSTALLED / f"{name}.venv"
        stamp = venv / "installed"
        if stamp.exists() and stamp.read_text() == PEERS[name]:
            return
        _run(sys.executable, "-m", "venv", str(venv))
        _run(str(venv / "bin/python"), "-m", "pip", "install", "--quiet", PEERS[name])
        stamp.write_text(PEERS[name])

    return install_peer


def _run(*command: str, cwd: str | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as e:
        raise Unavailable(f"{command[0]}: {e.strerror}") from e
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise Unavailable(f"{' '.join(command[:3])} ... failed: {' '.join(last)}")
