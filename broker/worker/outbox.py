"""What one frontend has yet to be sent: a step being gathered, and messages closed but not yet taken by its socket.

    put, put, put ... flush -> [STEP_TAG, incarnation, [delta, delta, delta]]      one message per engine step

The number of ZMQ messages is what costs, not their size, so the deltas of all requests of one frontend travel
together. Pure: the socket is the `send` handed to `flush`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from broker import wire

STEP_BYTES = 1024 * 1024
"""A step message is closed when its data reach this size; a longer delta is cut before it gets here."""

Delta = tuple[int, int, int, bytes] | tuple[int, int, int, bytes, int]


class Outbox:
    """Owner: the engine's record of one frontend."""

    def __init__(self, incarnation: bytes) -> None:
        self._incarnation = incarnation
        self._gathered: list[Delta] = []
        self._gathered_bytes = 0
        self._closed: deque[bytes] = deque()
        self._closed_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes kept here because the frontend does not take them."""
        return self._gathered_bytes + self._closed_bytes

    @property
    def is_empty(self) -> bool:
        return not self._gathered and not self._closed

    def put(self, delta: Delta) -> None:
        if self._gathered_bytes + len(delta[3]) > STEP_BYTES and self._gathered:
            self._close_message()
        self._gathered.append(delta)
        self._gathered_bytes += len(delta[3])

    def flush(self, send: Callable[[bytes], bool]) -> bool:
        """Sends what there is, oldest first. `send` says False when the socket takes no more now; then the rest
        stays, in order, and this is False too."""
        if self._gathered:
            self._close_message()
        while self._closed:
            if not send(self._closed[0]):
                return False
            self._closed_bytes -= len(self._closed.popleft())
        return True

    def clear(self) -> None:
        """Forgets everything unsent."""
        self._gathered, self._gathered_bytes = [], 0
        self._closed.clear()
        self._closed_bytes = 0

    def _close_message(self) -> None:
        message = wire.encode([wire.STEP_TAG, self._incarnation, self._gathered])
        self._closed.append(message)
        self._closed_bytes += len(message)
        self._gathered, self._gathered_bytes = [], 0
