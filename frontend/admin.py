"""The routes for people and tools: the fleet, its changes, health, metrics, models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from broker import wire
from broker.config import Config
from broker.errors import UNDECODABLE, BadRequest, BodyTooLarge, ModelNotFound, PenstockError, SchedulerAway
from broker.faces import Face, face_of
from broker.table import ClusterState, State
from broker.types import Role
from broker.view import TableReader
from frontend import errors, fleet
from frontend.control import Control
from frontend.errors import UnknownRequest
from frontend.metrics import CONTENT_TYPE, Metrics

MAX_BODY_BYTES = wire.MAX_CONTROL_BYTES - 64
"""Of a registration: it must fit a control message."""


class _Drain(msgspec.Struct):
    url: str
    resume: bool = False


class Admin:
    """Endpoints over one frontend's table and control socket; owns neither."""

    def __init__(self, run_dir: Path, config: Config, table: TableReader, control: Control, metrics: Metrics) -> None:
        self._run_dir = run_dir
        self._config = config
        self._face = face_of(config)
        self._table = table
        self._control = control
        self._metrics = metrics
        self._since = int(time.time())

    # -- the fleet ---------------------------------------------------------------------------------------------

    async def register(self, request: Request) -> Response:
        """200 means that every frontend sees the instance; the fields are the scheduler's to check."""
        try:
            reply = await self._control.register(await body(request))
        except PenstockError as error:
            said = self._face.refused(error)
            return Response(said.body, said.status, {"content-type": said.kind, **_retry_after(error)})
        return passed_on(reply, self._face)

    async def drain(self, request: Request) -> Response:
        """`{"url": ..., "resume": false}`: no new requests to the instance, or again."""
        try:
            asked = msgspec.json.decode(await body(request), type=_Drain)
        except UNDECODABLE as e:
            raise BadRequest(f"the body must be like {{'url': '...', 'resume': false}}: {e}") from e
        return passed_on(await self._control.drain(asked.url, resume=asked.resume), self._face)

    async def instances(self, request: Request) -> Response:
        now_ns = time.monotonic_ns()
        return json_response(
            {"instances": fleet.rows(self._table, now_ns), "scheduler": self._scheduler(now_ns)},
        )

    async def queue(self, request: Request) -> Response:
        """Who waits for room, and what has been moved."""
        rows = fleet.queue(self._table)
        return json_response(
            {
                "tickets": sum(row.tickets for row in rows),
                "tokens": sum(row.tokens for row in rows),
                "instances": rows,
                "scheduler": self._scheduler(time.monotonic_ns()),
                **({"cluster": await self._members()} if self._shares() else {}),
            }
        )

    async def _members(self) -> Any:
        """What the scheduler says of the cluster; while it is away, what the table says."""
        try:
            reply = await self._control.show_cluster()
        except PenstockError as error:
            return {**self._cluster(), "reason": error.message, "hosts": []}
        return msgspec.json.decode(reply.body)["cluster"]

    async def explain(self, request: Request) -> Response:
        """Why the request of that id went where it went, as far as any frontend remembers it."""
        ident = request.path_params["ident"]
        try:
            said = msgspec.json.decode((await self._control.explain_request(ident)).body)
        except SchedulerAway:  # the others cannot be asked
            said = {"requests": [msgspec.Raw(told) for told in self._control.explain(ident)]}
            said["silent_frontends"] = max(0, len(self._table.counters.live()) - 1)
        if not said["requests"]:
            raise UnknownRequest(self._unknown(said["silent_frontends"]))
        return json_response(said)

    def _unknown(self, silent: int) -> str:
        most = self._config.server.decisions
        missing = f"; {silent} frontends could not be asked" if silent else ""
        return f"no request of that id is remembered: each frontend keeps the last {most} (server.decisions){missing}"

    async def endpoints(self, request: Request) -> Response:
        """Where native engines find the scheduler."""
        settings = self._config.engines
        host = request.url.hostname or "127.0.0.1"
        return json_response(
            {
                "protocol": wire.PROTOCOL,
                "run": self._run_dir.name.rpartition("-")[2],
                "control": [f"ipc://{self._run_dir}/engines.sock", *_reachable(settings.control_bind, host)],
                "load": [f"ipc://{self._run_dir}/load.sock", *_reachable(settings.load_bind, host)],
            }
        )

    # -- health ------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """Live: it answers."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Ready: the fleet is known and somebody can be asked. That the scheduler is away changes nothing here:
        requests are served without it."""
        ready: dict[Role, int] = {}
        for entry in self._table.entries():
            if entry.state is State.READY:
                ready[entry.instance.role] = ready.get(entry.instance.role, 0) + 1
        needed = (Role.PREFILL, Role.DECODE) if self._config.server.splitwise else (Role.MIXED,)
        reasons = [f"no {role.name.lower()} instance is ready" for role in needed if role not in ready]
        if not self._table.ready:
            reasons.insert(0, "the scheduler has not yet asked the configured instances")
        details = {
            "status": "not ready" if reasons else "ready",
            "reasons": reasons,
            "instances": {role.name.lower(): count for role, count in ready.items()},
            "scheduler": self._scheduler(time.monotonic_ns()),
            **({"cluster": self._cluster()} if self._shares() else {}),
        }
        return json_response(details, 503 if reasons else 200, {"retry-after": "1"} if reasons else None)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    # -- models ------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        names = fleet.models(self._table, self._config.models.aliases)
        return json_response({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in fleet.models(self._table, self._config.models.aliases):
            raise ModelNotFound(f"The model `{name}` does not exist", param="model")
        return json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._since, "owned_by": "penstock"}

    def _shares(self) -> bool:
        return self._table.cluster[0] is not ClusterState.OFF

    def _cluster(self) -> dict[str, Any]:
        """Whether this host shares with others now. Alone it serves all the same."""
        if not self._table.alive(time.monotonic_ns()):
            return {"state": "unknown", "members": 0}  # the scheduler died a member, or did not
        state, hosts = self._table.cluster
        return {"state": state.name.lower(), "members": hosts}

    def _scheduler(self, now_ns: int) -> dict[str, Any]:
        return {"state": "alive" if self._table.alive(now_ns) else "away", "epoch": self._table.epoch}


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


def error_response(error: PenstockError, face: Face) -> Response:
    status, data, found = errors.whole(error, face)
    return Response(data, status, {name.decode(): value.decode() for name, value in found})


def _retry_after(error: PenstockError) -> dict[str, str]:
    return {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}


def passed_on(reply: wire.Reply, face: Face) -> Response:
    return Response(reply.body, reply.status, {"content-type": face.json_kind})


async def body(request: Request) -> bytes:
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > MAX_BODY_BYTES:
                raise BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
    except ClientDisconnect as e:
        raise BadRequest("the client left") from e
    return bytes(data)


def _reachable(bind: str, host: str) -> list[str]:
    """A bound endpoint as others must write it: a wildcard is replaced by the host they asked us under."""
    if not bind:
        return []
    parts = urlsplit(bind)
    if parts.hostname in ("0.0.0.0", "::", "*"):
        shown = f"[{host}]" if ":" in host else host
        return [f"{parts.scheme}://{shown}:{bind.rpartition(':')[2]}"]
    return [bind]
