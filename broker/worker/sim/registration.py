"""Heartbeat registration over HTTP, as a FastDeploy engine does it: `POST {router}/register` for ever."""

from __future__ import annotations

import asyncio
import http.client
import logging
from typing import Any

import orjson

from broker.worker.endpoints import host_and_port
from broker.worker.sim.handover import Identity

log = logging.getLogger(__name__)

BEAT_S = 5.0
RETRY_S = 0.5
"""After a refusal or no answer: sooner than the engines do, so that a start does not last."""


def body_of(me: Identity, *, models: tuple[str, ...], capacity: int) -> dict[str, Any]:
    """What is registered. FastDeploy's engines know none of the fields that Penstock adds."""
    body: dict[str, Any] = {
        "role": me.role,
        "host_ip": me.host,
        "port": me.port,
        "metrics_port": me.port,
        "connector_port": me.port,
        "engine_worker_queue_port": me.port,
        "transfer_protocol": ["ipc", "rdma"],
        "rdma_ports": list(me.rdma_ports),
        "device_ids": list(me.device_ids),
        "tp_size": 1,
    }
    if me.dialect == "fastdeploy":
        return body | {"is_paused": False, "version": "0", "connected_decodes": []}
    if me.role != "mixed" and me.connector:
        body |= {"connector": me.connector, "bootstrap_port": me.port, "zmq_address": f"{me.host}:{me.port}"}
    return body | {"engine": me.dialect, "models": list(models), "capacity": capacity}


async def beat(router: str, body: dict[str, Any]) -> None:
    """Registers every `BEAT_S`, sooner while it fails; each kind of failure is logged once in a row."""
    last = ""
    while True:
        failure = await asyncio.to_thread(_post, router, orjson.dumps(body))
        if failure != last:
            log.log(logging.WARNING if failure else logging.INFO, "registration at %s: %s", router, failure or "done")
        last = failure
        await asyncio.sleep(RETRY_S if failure else BEAT_S)


def _post(router: str, body: bytes) -> str:
    """Empty when it was accepted, else what went wrong."""
    host, port = host_and_port(router)
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("POST", "/register", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read(4096)
    except (OSError, http.client.HTTPException) as e:
        return f"no answer ({type(e).__name__})"
    finally:
        connection.close()
    return "" if 200 <= response.status < 300 else f"{response.status} {text.decode(errors='replace')}"
