"""Puts a frontend together, and takes it apart again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from functools import partial
from pathlib import Path

import uvicorn
import zmq
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from broker import batched
from broker.config import Config
from broker.counters import FrontendCounters, TotalColumn, attach_counters
from broker.errors import PenstockError
from broker.faces import face_of
from broker.policies import need_index
from broker.prefix import PrefixIndex
from broker.types import Instance
from broker.view import TableReader
from frontend.accept import Evenness
from frontend.admin import Admin
from frontend.admission import Admission
from frontend.api import Inference
from frontend.breaker import Breaker
from frontend.control import Control
from frontend.dispatch import Chooser, Dispatcher, make_policies
from frontend.errors import Stopping
from frontend.explain import Explainer
from frontend.fastdeploy import FastDeployRoutes
from frontend.forwarder import Forwarder
from frontend.metrics import Metrics
from frontend.notices import Notices
from frontend.outbox import Outbox
from frontend.outside import Outside, Told
from frontend.pair import Pairer
from frontend.rescue import Rescuer
from frontend.server import KEEP_ALIVE_S, Server, quiet_uvicorn
from frontend.sessions import by_role
from frontend.story import Stories
from frontend.upstream.http import HttpUpstream
from frontend.upstream.zmq import ZmqUpstream
from frontend.watch import Watch

logger = logging.getLogger("frontend")


def application(inference: Inference, admin: Admin, fastdeploy: FastDeployRoutes) -> Starlette:
    """The routes that the face has, and what it says where there is none."""
    outside = Outside(inference.face, "frontend")
    app = Starlette(
        routes=outside.kept(
            [
                Route("/v1/models", admin.models, methods=["GET"]),
                Route("/v1/models/{model:path}", admin.model, methods=["GET"]),
                Route("/v1/abort_requests", fastdeploy.abort_requests, methods=["POST"]),
                Route("/v1/{rest:path}", inference, methods=["POST"]),
                Route("/register", admin.register, methods=["POST"]),
                Route("/registered", fastdeploy.registered, methods=["GET"]),
                Route("/registered_number", fastdeploy.registered_number, methods=["GET"]),
                Route("/decode_instances", fastdeploy.decode_instances, methods=["GET"]),
                Route("/health_generate", fastdeploy.health_generate, methods=["GET"]),
                Route("/drain", admin.drain, methods=["POST"]),
                Route("/instances", admin.instances, methods=["GET"]),
                Route("/queue", admin.queue, methods=["GET"]),
                Route("/explain/{ident:path}", admin.explain, methods=["GET"]),
                Route("/endpoints", admin.endpoints, methods=["GET"]),
                Route("/health", admin.health, methods=["GET"]),
                Route("/ready", admin.ready, methods=["GET"]),
                Route("/metrics", admin.metrics, methods=["GET"]),
            ]
        ),
        exception_handlers={
            HTTPException: outside.no_route,
            PenstockError: outside.refused,
            Exception: outside.internal,
        },
    )
    app.router.redirect_slashes = False
    return app


def forget_guest(table: TableReader, http: HttpUpstream, native: ZmqUpstream, instance: Instance) -> None:
    """An instance of another host is no longer used; unless it is ours as well, its connections are not kept."""
    if any(entry.instance.url == instance.url for entry in table.entries()):
        return
    if instance.is_native:
        native.forget(instance.incarnation)
    else:
        http.forget(instance.url)


async def serve(
    run_dir: Path, config: Config, index: int, life: int, listen_fd: int, ready_fd: int, alive_fd: int
) -> None:
    """One frontend's life; returns after a graceful stop. `ready_fd` and `alive_fd` may be -1."""
    quiet_uvicorn()
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        batched.start(loop)
        stack.callback(batched.stop)
        table = TableReader.attach(run_dir, config)
        stack.callback(table.close)
        segment = stack.enter_context(attach_counters(run_dir, config))
        counters = FrontendCounters(segment, index)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.term)
        outbox = Outbox(loop)
        http = HttpUpstream(config, outbox)
        dropped = partial(counters.count, TotalColumn.FRAMES_DROPPED)
        native = ZmqUpstream(config, outbox, on_drop=dropped)
        stack.callback(native.close)
        stack.callback(http.close)

        def on_epoch(epoch: int) -> None:
            native.resync(epoch)
            admission.offer_again()

        control = Control(run_dir, config, table, index, life, context, loop, on_epoch)
        stack.callback(control.close)
        stack.callback(Watch(table, http, native, loop).close)
        breaker = Breaker(config.upstream.breaker_failures, config.upstream.breaker_secs)
        prefixes = PrefixIndex.of_run(run_dir, config, index) if need_index(config) else None
        if prefixes is not None:
            stack.callback(Notices(prefixes, counters, control.note, loop).close)
        face = face_of(config)
        stories = Stories.of(face, table)
        policies = make_policies(config, index, prefixes)
        dispatcher = Dispatcher(table, counters, policies, breaker)
        dispatcher.sessions = by_role(config.scheduler, counters)
        forget = partial(forget_guest, table, http, native)
        admission = Admission(config, table, dispatcher, counters, life, loop, control.offer, forget)
        stack.callback(admission.close)
        control.on_grants = admission.hear
        line = admission if face.queues else dispatcher
        chooser: Chooser = line
        if config.server.splitwise:
            chooser = Pairer.over(table, dispatcher, loop, config, admission if face.queues else None)
        forwarder = Forwarder(config, chooser, counters, http, native, loop)
        control.end_requests = forwarder.end_requests
        control.explain = Explainer(
            index, table, forwarder.policies, forwarder.decisions, forwarder.under_way, forwarder.clock
        ).messages
        if config.scheduler.rescues_per_sec and face.queues and not config.server.splitwise:
            stack.callback(Rescuer(config.scheduler, table, admission, forwarder, loop).close)
        admin = Admin(run_dir, config, table, control, Metrics(table, segment, forwarder.pairings))
        inference = Inference(config, forwarder, stories)
        drain_s = config.server.drain_secs

        def on_ready() -> None:
            if ready_fd >= 0:
                os.write(ready_fd, b"ready\n")
                os.close(ready_fd)

        too_late = Stopping(f"the router stops, and the {drain_s:g} s for running requests are over")

        hurry = True

        def limit() -> None:
            loop.call_later(drain_s, forwarder.end_all, too_late)

        def on_stop() -> None:
            if hurry:
                limit()

        server = Server(
            uvicorn.Config(
                Told(
                    application(inference, admin, FastDeployRoutes(table, control, face)),
                    stories,
                    face,
                ),
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                # Counted from 0.1 s after the stop: streams that are ended at the limit have that long to say so.
                timeout_graceful_shutdown=math.ceil(drain_s),
            ),
            socket.socket(fileno=listen_fd),
            counters,
            Evenness(segment, table.counters, index).is_ahead,
            on_ready,
            on_stop,
            inference if config.server.lean_path else None,
            inference.bound,
            outbox,
        )

        def stop() -> None:
            if server.should_exit:  # it was leaving without haste
                limit()
            server.should_exit = True
            if alive_fd >= 0:
                loop.remove_reader(alive_fd)

        def leave() -> None:
            """Another frontend has taken over: no new connections, and the streams under way take what they take."""
            nonlocal hurry
            hurry = False
            server.config.timeout_graceful_shutdown = None
            server.should_exit = True

        loop.add_signal_handler(signal.SIGTERM, stop)
        loop.add_signal_handler(signal.SIGUSR2, leave)
        if alive_fd >= 0:
            # Only the supervisor holds the other end: readable means that it died, however it died.
            loop.add_reader(alive_fd, stop)
        await server.serve(sockets=[])
        forwarder.end_all(too_late)  # whoever's client did not even take that
