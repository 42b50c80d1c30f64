"""How much of clients' bodies a frontend holds that are not whole yet: many slow clients together must not exhaust it.

A body that comes in one read is never counted: it is held no longer than the read itself. (Bodies that are whole and
wait for room are bounded by the queue.)
"""

from __future__ import annotations

from broker.errors import ReceivingFull


class Receiving:
    """Of one frontend. Whoever takes gives back, when the body is whole or no longer wanted."""

    __slots__ = ("_most", "held")

    def __init__(self, most: int) -> None:
        """`most`: bytes, of all bodies together."""
        self._most = most
        self.held = 0

    def take(self, size: int) -> None:
        """For so many bytes more of a body. Raises `ReceivingFull`, and then they do not count."""
        if self.held + size > self._most:
            raise ReceivingFull(f"the bodies being received here have more than {self._most} bytes together")
        self.held += size

    def give_back(self, size: int) -> None:
        self.held -= size
