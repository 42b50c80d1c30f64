"""Tells the transports who came and who left, so that the first request finds a connection and nothing is kept."""

from __future__ import annotations

import asyncio

from broker.types import Instance
from broker.view import TableReader
from frontend.upstream.http import HttpUpstream
from frontend.upstream.zmq import ZmqUpstream

LOOK_S = 0.25


class Watch:
    """Compares the fleet with the one it saw last; owned by the frontend's process."""

    def __init__(
        self, table: TableReader, http: HttpUpstream, native: ZmqUpstream, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._table = table
        self._http = http
        self._native = native
        self._loop = loop
        self._seen: dict[tuple[str, bytes], Instance] = {}
        self._timer = loop.call_soon(self._look)

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK_S, self._look)
        now = {(e.instance.url, e.instance.incarnation): e.instance for e in self._table.entries()}
        came = [instance for key, instance in now.items() if key not in self._seen]
        for key in self._seen.keys() - now.keys():
            url, incarnation = key
            if self._seen[key].is_native:
                self._native.forget(incarnation)
            else:
                self._http.forget(url)
        self._seen = now
        if came:
            self._native.see(came)
