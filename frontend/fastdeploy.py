"""Routes that FastDeploy's engines, clients and tools ask a router for, in its forms.

Registered = known and not DOWN: the original forgets an instance that fails its health checks, so those that ask here
expect to see only what serves.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response

from broker.faces import PENSTOCK, Face, go
from broker.table import State
from broker.types import FastDeployFields, Instance, Role
from broker.view import TableReader
from frontend.admin import body, passed_on
from frontend.control import Control


class FastDeployRoutes:
    """Endpoints over one frontend's table and control socket; owns neither."""

    def __init__(self, table: TableReader, control: Control, face: Face = PENSTOCK) -> None:
        self._table = table
        self._face = face
        self._control = control

    async def registered(self, request: Request) -> Response:
        """Every instance, by role."""
        found = self._by_role()
        return self._json(
            {
                "code": 200,
                "decode": [_entry(instance) for instance in found[Role.DECODE]],
                "mixed": [_entry(instance) for instance in found[Role.MIXED]],
                "msg": "success",
                "prefill": [_entry(instance) for instance in found[Role.PREFILL]],
            }
        )

    async def registered_number(self, request: Request) -> Response:
        found = self._by_role()
        return self._json({role.name.lower(): len(found[role]) for role in (Role.DECODE, Role.MIXED, Role.PREFILL)})

    async def decode_instances(self, request: Request) -> Response:
        """For prefill engines that connect beforehand (`FD_ENABLE_PD_RDMA_EAGER_CONNECT`): where decode is, of the
        weights' `version` if it is asked for and known."""
        version = request.query_params.get("version", "")
        decodes = self._by_role()[Role.DECODE]
        wanted = [i for i in decodes if not version or _fields(i).version in ("", version)]
        return self._json([_registration(instance) for instance in wanted])

    async def health_generate(self, request: Request) -> Response:
        """Every prefill and decode instance is asked now. Always 200: what was found is in the scheduler's log."""
        return passed_on(await self._control.check_health(), self._face)

    async def abort_requests(self, request: Request) -> Response:
        """`{"req_ids": [...]}` or `{"abort_all": true}`: ends requests wherever they are."""
        return passed_on(await self._control.abort_requests(await body(request)), self._face)

    def _json(self, content: Any) -> Response:
        return Response(go.dumps(content), 200, {"content-type": self._face.json_kind})

    def _by_role(self) -> dict[Role, list[Instance]]:
        found: dict[Role, list[Instance]] = {role: [] for role in Role}
        for entry in self._table.entries():
            if entry.state is not State.DOWN:
                found[entry.instance.role].append(entry.instance)
        return found


def _fields(instance: Instance) -> FastDeployFields:
    return instance.fastdeploy or FastDeployFields()


def _entry(instance: Instance) -> dict[str, Any]:
    """As `/registered` shows an instance: nulls where nothing was sent, ports as text."""
    fields = _fields(instance)
    return {
        "url": instance.url,
        "worker_type": instance.role.name.lower(),
        "connector_port": fields.connector_port,
        "engine_worker_queue_port": fields.engine_worker_queue_port,
        "transfer_protocol": fields.transfer_protocol,
        "rdma_ports": fields.rdma_ports,
        "device_ids": fields.device_ids,
        "metrics_port": fields.metrics_port or str(urlsplit(instance.url).port or ""),
        "tp_size": fields.tp_size,
    }


def _registration(instance: Instance) -> dict[str, Any]:
    """As the instance registered itself, its role in capitals."""
    fields, address = _fields(instance), urlsplit(instance.url)
    return {
        "role": instance.role.name,
        "host_ip": address.hostname or "",
        "port": address.port,
        "connector_port": fields.connector_port,
        "engine_worker_queue_port": fields.engine_worker_queue_port,
        "transfer_protocol": fields.transfer_protocol or [],
        "rdma_ports": fields.rdma_ports or [],
        "device_ids": fields.device_ids or [],
        "metrics_port": fields.metrics_port or address.port,
        "tp_size": fields.tp_size,
        "version": fields.version,
        "is_paused": fields.is_paused,
    }
