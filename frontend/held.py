"""An answer that is kept back until it is known whether it is to be the client's."""

from __future__ import annotations

from frontend.upstream.base import Headers

MOST_BYTES = 1024 * 1024
"""Of a body that is gathered; a larger one is passed on as it comes."""


class Held:
    """What an engine has said so far."""

    __slots__ = ("_parts", "_size", "gathers", "headers", "is_whole", "status", "waits")

    def __init__(self, status: int, headers: Headers, *, gathers: bool) -> None:
        self.status = status
        self.headers = headers
        self.gathers = gathers
        """It is looked at when it is whole."""
        self.waits = False
        """For something else to happen first."""
        self.is_whole = False
        self._parts: list[bytes] = []
        self._size = 0

    def __repr__(self) -> str:
        return f"Held({self.status}, {self._size} bytes{', whole' if self.is_whole else ''})"

    @property
    def stays(self) -> bool:
        """It is not yet to be passed on."""
        return self.waits or (self.gathers and not self.is_whole and self._size <= MOST_BYTES)

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    def add(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
