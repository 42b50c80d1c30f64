"""See conduit.py and `_conduit.c`."""

from typing import Final, final

@final
class Conduit:
    def __init__(self, client: int) -> None:
        """`client`: descriptor of the client's socket."""
    next: int
    """Of a native engine's answer, the number of the delta that is due."""
    touched: Final[float]
    """When something came last; 0: nothing has."""
    size: Final[int]
    """Bytes of the body."""
    events: Final[int]
    last: Final[bytes | None]
    """What was sent last, as a chunk in its frame; several, if they came together."""
    tail: Final[bytes | None]
    """And before it."""
    def close(self) -> None:
        """The client is gone, or about to be: nothing is sent any more. Idempotent."""

@final
class Intake:
    """Reads the sockets of HTTP engines whose answers flow. Its descriptor is readable while there is something to do.
    Raises `OSError` if the kernel grants no descriptor."""

    def __init__(self) -> None: ...
    def __len__(self) -> int:
        """Conduits that have joined."""
    def fileno(self) -> int: ...
    def join(self, conduit: Conduit, engine: int, owner: object, /) -> bool:
        """From now on what comes on this socket goes to the client. False: the kernel takes no more."""
    def leave(self, conduit: Conduit, /) -> None:
        """Nothing is read for it any more. Idempotent."""
    def turn(self, now: float, /) -> list[tuple[object, bytes, bytes]] | None:
        """Passes on what has come. Returns the owners of those that have left by it, with what was read and is not a
        whole number of chunks (nothing: look at the socket), and what the client's socket did not take."""

def step(
    frame: bytes | memoryview, incarnation: bytes, conduits: dict[int, Conduit], now: float, /
) -> tuple[()] | tuple[list[tuple[int, int, int, bytes]], list[tuple[int, bytes]]] | None:
    """Passes on what a native engine's step has for these conduits, by the numbers of their requests. Returns the
    deltas that are not theirs, or not just the next piece of an answer, and what clients' sockets did not take.

    None: this is not a plain step of this life of an engine, and nothing was done."""
