"""The edge of the ASGI application: which of its routes a face has, what is said where there is none, what is told."""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from broker.errors import PenstockError
from broker.faces import Event, Face
from broker.narrator import Narrator
from frontend.admin import error_response
from frontend.story import Stories

INFERENCE = "/v1/"
"""Below it, what `POST` says is told by the request's own story, except for `ABORT`."""
ABORT = "/v1/abort_requests"


class Outside:
    """The routes of a face, and its answers where no route answers."""

    def __init__(self, face: Face, logger: str) -> None:
        self._face = face
        self._narrator = Narrator(face, logger)
        self._routes: list[Route] = []

    def kept(self, routes: Sequence[Route]) -> list[Route]:
        """Those that the face has; of one for many paths, the paths that it has."""
        face = self._face
        for route in routes:
            named = [route.path] if "{" not in route.path else [p for p in sorted(face.paths or ()) if _fits(route, p)]
            if face.paths is None:
                self._routes.append(route)
            else:
                self._routes += [
                    Route(path, route.endpoint, methods=list(route.methods or ()))
                    for path in named
                    if path in face.paths
                ]
        for route in self._routes:
            if not face.answers_head and route.methods is not None:
                route.methods.discard("HEAD")
        return self._routes

    async def no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path
        methods = self._methods(path.removesuffix("/"))
        said, location = self._face.no_route(request.method, path, methods, error.status_code == 405)
        found = dict(error.headers or {}) if said.status == error.status_code else {}
        if location:
            found["location"] = location + (f"?{request.url.query}" if request.url.query else "")
        if said.kind:
            found["content-type"] = said.kind
        return Response(said.body, said.status, found)

    async def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, PenstockError)
        return error_response(error, self._face)

    async def internal(self, request: Request, error: Exception) -> Response:
        """The outermost net: starlette raises the error again after this answer, and uvicorn logs it."""
        self._narrator.tell(Event.PANIC, error=repr(error))
        return Response(self._face.panic.body, self._face.panic.status, media_type=self._face.panic.kind)

    def _methods(self, path: str) -> set[str]:
        """That some route has for a path."""
        return {method for route in self._routes if route.path == path for method in route.methods or ()}


def _fits(route: Route, path: str) -> bool:
    method = next(iter(route.methods or ()), "GET")
    return route.matches({"type": "http", "path": path, "method": method, "headers": []})[0] is Match.FULL


class Told:
    """An ASGI application whose answers are told in the log, where the face has a line for them."""

    def __init__(self, app: ASGIApp, stories: Stories | None, face: Face) -> None:
        self._app = app
        self._stories = stories
        self._face = face

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if self._stories is None or self._is_inference(scope["method"], path):
            await self._app(scope, receive, send)
            return
        client = scope.get("client")
        query = scope["query_string"].decode("latin-1")
        asked = f"{path}?{query}" if query else path
        story = self._stories.begin(scope["method"], asked, client[0] if client else "")
        began, status = time.monotonic(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            story.ended(status, time.monotonic() - began, completed=False)

    def _is_inference(self, method: str, path: str) -> bool:
        """Then the request's own story is told."""
        served = self._face.paths is None or path in self._face.paths
        return method == "POST" and path.startswith(INFERENCE) and path != ABORT and served
