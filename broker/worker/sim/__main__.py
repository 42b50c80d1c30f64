"""`python -m broker.worker.sim`: one simulated engine as a process.

Prints one JSON line when it listens: `{"name", "transport", "url", "admin", "pid"}`. SIGTERM ends it within 5 s.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TypeVar

import msgspec
import orjson
import uvloop
from starlette.applications import Starlette

from broker.types import Role
from broker.worker.engine import Engine
from broker.worker.request import EngineError
from broker.worker.sim import http, pd, registration
from broker.worker.sim.engine import SimulatedEngine
from broker.worker.sim.faults import Faults
from broker.worker.sim.model import Speeds
from broker.worker.sim.native import NativeRunner
from broker.worker.sim.server import Server

N = TypeVar("N", int, float)

DIALECTS = ("vllm", "sglang", "fastdeploy", "openai")
DRAIN_S = 3.0
"""What runs at SIGTERM may go on for this long."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="penstock sim", description="A simulated LLM engine.")
    p.add_argument("--name", default="sim", help="who it is; its answers depend on it")
    p.add_argument("--transport", choices=("http", "zmq"), default="http")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=0, help="HTTP port, 0 = a free one")
    p.add_argument("--bind", default="", help="zmq: endpoint for the frontends; default: a unix socket, or TCP")
    p.add_argument("--admin-port", type=int, default=None, help="zmq: HTTP port of /ledger, /fault, /metrics; 0 = free")
    p.add_argument("--router", default="", help="Penstock's address; registers there")
    p.add_argument("--model", action="append", default=[], help="a model it serves (repeatable); none = any")
    p.add_argument("--role", choices=("mixed", "prefill", "decode"), default="mixed")
    p.add_argument("--dialect", choices=DIALECTS, default="vllm")
    p.add_argument("--connector", choices=("nixl", "mooncake", "p2p_nccl"), default="", help="vllm: how pairs meet")
    p.add_argument("--capacity", type=int, default=128, help="requests that run at once")
    p.add_argument("--transfer", default="", help="zmq: transfer metadata, as hex; default: its own")
    p.add_argument("--speed", type=float, default=1.0, help="how many times faster than real time")
    p.add_argument("--prefill-tokens-per-s", type=float, default=10_000.0)
    p.add_argument("--decode-step-ms", type=float, default=12.0)
    p.add_argument("--kv-blocks", type=int, default=16_384)
    p.add_argument("--block-size", type=int, default=16)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--alive-fd", type=int, default=None, help="end when this descriptor is closed; ignore SIGINT")
    p.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")
    f = p.add_argument_group("faults (also by POST /fault)")
    f.add_argument("--slow", type=float)
    f.add_argument("--hang-after", type=int)
    f.add_argument("--die-after", type=int)
    f.add_argument("--reject-share", type=float)
    f.add_argument("--reject-status", type=int)
    f.add_argument("--silent-metrics", action="store_true", default=None)
    f.add_argument("--unhealthy", action="store_true", default=None)
    f.add_argument("--malformed", choices=("head", "truncated", "frame", "gap"))
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one engine until it is told to end; the exit status. Wrong options end the program as argparse does."""
    p = parser()
    options = p.parse_args(argv)
    if options.transport == "zmq" and not options.router:
        p.error("--transport zmq needs --router")
    logging.basicConfig(
        level=options.log_level.upper(), stream=sys.stderr, format=f"{options.name} %(levelname)s %(name)s: %(message)s"
    )
    try:
        sim = _simulated(options)
        transfer = bytes.fromhex(options.transfer)
    except (ValueError, EngineError) as e:
        p.error(str(e))
    shell = _serve_zmq(options, sim, transfer) if options.transport == "zmq" else _serve_http(options, sim)
    uvloop.run(shell)
    return 0


def _simulated(options: argparse.Namespace) -> SimulatedEngine:
    names = Faults.__struct_fields__
    faults = Faults().changed(orjson.dumps({n: v for n in names if (v := getattr(options, n)) is not None}))
    speeds = Speeds(
        batch=_positive("--capacity", options.capacity),
        prefill_tokens_per_s=_positive("--prefill-tokens-per-s", options.prefill_tokens_per_s),
        step_s=_positive("--decode-step-ms", options.decode_step_ms) / 1000,
        kv_blocks=_positive("--kv-blocks", options.kv_blocks),
        block_size=_positive("--block-size", options.block_size),
    )
    return SimulatedEngine(
        options.name,
        models=tuple(options.model),
        speeds=speeds,
        speed=_positive("--speed", options.speed),
        faults=faults,
        seed=options.seed,
    )


async def _serve_http(options: argparse.Namespace, sim: SimulatedEngine) -> None:
    listener = _listen(options.host, options.port)
    port = listener.getsockname()[1]
    me = _identity(options, sim, port)
    stop = _stop_event(options.alive_fd)
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(sim.run())]
        server = Server(http.app(sim, lambda: me), DRAIN_S)
        serving = tasks.create_task(server.serve([listener]))
        await server.listening.wait()
        url = f"http://{options.host}:{port}"
        _announce(sim, options, url, url)
        if options.router:
            body = registration.body_of(me, models=sim.models, capacity=options.capacity)
            running.append(tasks.create_task(registration.beat(options.router, body)))
        await stop.wait()
        server.should_exit = True
        await serving
        for task in running:
            task.cancel()


async def _serve_zmq(options: argparse.Namespace, sim: SimulatedEngine, transfer: bytes) -> None:
    stop = _stop_event(options.alive_fd)
    listener: socket.socket | None = None
    if options.admin_port is not None or options.role != "mixed":
        listener = _listen(options.host, options.admin_port or 0)
    me = _identity(options, sim, listener.getsockname()[1] if listener else 0)
    handover = pd.Handover()
    runner = NativeRunner(sim, me, handover)
    if me.role != "mixed" and not transfer:
        transfer = pd.metadata(me)
    engine = Engine(
        runner,
        router=options.router,
        models=sim.models,
        role=Role[options.role.upper()],
        capacity=options.capacity,
        transfer=transfer,
        bind=options.bind,
        name=options.name,
    )
    runner.engine = engine
    sim.on_step, sim.on_faults = runner.after_step, runner.after_faults
    runner.after_faults()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(sim.run())
        admin = ""
        server: Server | None = None
        if listener is not None:
            admin = f"http://{options.host}:{me.port}"
            routes = [*http.admin_routes(sim, options.dialect), http.transfer_route(handover)]
            server = Server(Starlette(routes=routes), DRAIN_S)
            tasks.create_task(server.serve([listener]))
            await server.listening.wait()
        engine.start()
        _announce(sim, options, engine.endpoint, admin)
        await stop.wait()
        await engine.stop(DRAIN_S)
        running.cancel()
        if server is not None:
            server.should_exit = True


def _identity(options: argparse.Namespace, sim: SimulatedEngine, port: int) -> pd.Identity:
    return pd.Identity(
        name=sim.name,
        host=options.host,
        port=port,
        role=options.role,
        dialect=options.dialect,
        connector=options.connector or pd.CONNECTORS[options.dialect],
        rdma_ports=(str(port),),
    )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(2048)
    listener.setblocking(False)
    return listener


def _stop_event(alive_fd: int | None) -> asyncio.Event:
    """Set by SIGTERM, by SIGINT unless a parent looks after us, and by the end of that parent."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if alive_fd is None:
        loop.add_signal_handler(signal.SIGINT, stop.set)
        return stop

    def readable() -> None:
        if not os.read(alive_fd, 1):
            loop.remove_reader(alive_fd)
            stop.set()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop.add_reader(alive_fd, readable)
    return stop


def _announce(sim: SimulatedEngine, options: argparse.Namespace, url: str, admin: str) -> None:
    line = {"name": sim.name, "transport": options.transport, "url": url, "admin": admin, "pid": os.getpid()}
    print(msgspec.json.encode(line).decode(), flush=True)


def _positive(option: str, value: N) -> N:
    if value <= 0:
        raise ValueError(f"{option} must be positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
