"""The simulated engine as an OpenAI-compatible HTTP server, and the admin routes that both shells have."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import orjson
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from broker.worker.request import EngineError, Request
from broker.worker.sim import metrics, pd
from broker.worker.sim.engine import CREATED, KINDS, Job, SimulatedEngine
from broker.worker.sim.handover import engine_id

log = logging.getLogger(__name__)

JSON = "application/json"
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
NO_HEAD = (b"x-sim-malformed", b"head")
"""Makes `server.py` replace the whole head by something that is none."""


def admin_routes(sim: SimulatedEngine, dialect: str) -> list[Route]:
    """Health, metrics, faults and the ledger."""

    async def health(_: HttpRequest) -> Response:
        return Response(status_code=503 if sim.faults.unhealthy else 200)

    async def show_metrics(request: HttpRequest) -> Response:
        while sim.faults.silent_metrics and not await request.is_disconnected():  # noqa: ASYNC110 - the client too
            await asyncio.sleep(0.1)
        return PlainTextResponse(metrics.render(sim, dialect), media_type="text/plain; version=0.0.4")

    async def show_ledger(_: HttpRequest) -> Response:
        entries = [{f: getattr(e, f) for f in e.__struct_fields__} for e in sim.ledger]
        return _json({"name": sim.name, "idle": sim.is_idle, "requests": entries})

    async def fault(request: HttpRequest) -> Response:
        if request.method == "POST":
            try:
                sim.set_faults(sim.faults.changed(await request.body()))
            except EngineError as e:
                return Response(e.body(), e.status, media_type=JSON)
        return _json({f: getattr(sim.faults, f) for f in sim.faults.__struct_fields__})

    return [
        Route("/health", health),
        Route("/metrics", show_metrics),
        Route("/ledger", show_ledger),
        Route("/fault", fault, methods=["GET", "POST"]),
    ]


def app(sim: SimulatedEngine, me: Callable[[], pd.Identity]) -> Starlette:
    """The whole server. `me` is asked per request: the port is known only once the socket is bound."""
    handover = pd.Handover()

    async def models(_: HttpRequest) -> Response:
        data = [{"id": m, "object": "model", "created": CREATED, "owned_by": "sim"} for m in sim.models]
        return _json({"object": "list", "data": data})

    async def engine_ids(_: HttpRequest) -> Response:
        worker = {"0": {"0": f"{me().host}:{me().port}"}}
        return _json({"0": {"engine_id": engine_id(sim.name), "worker_addr": worker}})

    generate = Generation(sim, me, handover)
    return Starlette(
        routes=[
            *admin_routes(sim, me().dialect),
            Route("/v1/models", models),
            transfer_route(handover),
            *([Route("/query", engine_ids)] if me().connector == "mooncake" else []),
            *(Route(path, generate, methods=["POST"]) for path in KINDS),
        ]
    )


def transfer_route(handover: pd.Handover) -> Route:
    """Where decode instances fetch what this one has computed."""

    async def transfer(request: HttpRequest) -> Response:
        try:
            wait_s = min(float(request.query_params.get("wait_s", pd.WAIT_S)), pd.WAIT_S)
        except ValueError:
            return Response(status_code=400)
        proof = await handover.take(request.path_params["key"], wait_s)
        if proof is None:
            return Response(status_code=404)
        return _json({"name": proof.name, "proof": proof.proof})

    return Route("/sim/transfer/{key}", transfer)


class Generation:
    """The inference routes as plain ASGI: one object per application, one `_Stream` per request."""

    def __init__(self, sim: SimulatedEngine, me: Callable[[], pd.Identity], handover: pd.Handover) -> None:
        self._sim = sim
        self._me = me
        self._handover = handover

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = HttpRequest(scope, receive)
        try:
            raw = await http.body()
        except ClientDisconnect:
            return
        headers = dict(http.headers.items())
        gone = asyncio.ensure_future(_until_gone(receive))
        work = asyncio.ensure_future(self._answer(scope["path"], raw, headers, send))
        try:
            await asyncio.wait((gone, work), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()  # its `finally` aborts the job
            await asyncio.wait((gone, work))
        if not work.cancelled():
            work.result()

    async def _answer(self, path: str, raw: bytes, headers: dict[str, str], send: Send) -> None:
        chunks = _Chunks()
        job: Job | None = None
        started = False
        try:
            request = Request(uuid.uuid4().hex, path, raw, stream=False, headers=headers)
            stream = request.body.get("stream") is True
            request = Request(request.id, path, raw, stream=stream, headers=headers)
            prompt = self._sim.admit(request)
            transfer = await pd.begin(self._me(), self._handover, request, prompt)
            job = self._sim.submit(request, prompt, chunks, transfer)
            if stream:
                async for data in chunks:
                    if not started:
                        started = True
                        await _start(send, 200, self._spoiled(STREAM_HEADERS))
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    if self._sim.faults.malformed == "truncated":
                        raise Truncated
                await send({"type": "http.response.body", "body": b""})
            else:
                data = b"".join([piece async for piece in chunks])
                started = True
                await self._whole(send, data)
        except EngineError as e:
            if started:
                raise Truncated from e
            await _start(send, e.status, [(b"content-type", b"application/json")], len(body := e.body()))
            await send({"type": "http.response.body", "body": body})
        except Truncated:
            raise
        except Exception:
            log.exception("failed on %s", path)
            raise
        finally:
            if job is not None:
                self._sim.abort(job)

    async def _whole(self, send: Send, data: bytes) -> None:
        await _start(send, 200, self._spoiled([(b"content-type", b"application/json")]), len(data))
        if self._sim.faults.malformed == "truncated":
            await send({"type": "http.response.body", "body": data[: len(data) // 2], "more_body": True})
            raise Truncated
        await send({"type": "http.response.body", "body": data})

    def _spoiled(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        return [*headers, NO_HEAD] if self._sim.faults.malformed == "head" else headers


class Truncated(Exception):
    """Ends a response before its end: the server closes the connection."""


class _Chunks:
    """The pieces of one answer between the model's loop and the connection's task."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | EngineError | None] = asyncio.Queue()

    def emit(self, data: bytes) -> None:
        self._queue.put_nowait(data)

    def finish(self, data: bytes) -> None:
        self._queue.put_nowait(data)
        self._queue.put_nowait(None)

    def fail(self, error: EngineError) -> None:
        self._queue.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (item := await self._queue.get()) is not None:
            if isinstance(item, EngineError):
                raise item
            yield item


async def _until_gone(receive: Callable[[], Awaitable[object]]) -> None:
    while True:
        message = await receive()
        if isinstance(message, dict) and message.get("type") == "http.disconnect":
            return


async def _start(send: Send, status: int, headers: list[tuple[bytes, bytes]], length: int | None = None) -> None:
    if length is not None:
        headers = [*headers, (b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


def _json(value: object) -> Response:
    return Response(orjson.dumps(value), media_type=JSON)
