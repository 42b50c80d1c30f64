"""See conduit.py and `_conduit.h`."""

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
    ending: Final[bytes]
    """The last four bytes of the body, or all that have been sent."""
    last: Final[bytes]
    """What was sent last, or the end of it, if the engine's usage is in there; else nothing."""
    tail: Final[bytes]
    """The same of what was sent before it, if `last` is nothing."""
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

@final
class Conduits:
    """By the numbers of native requests."""

    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def add(self, number: int, conduit: Conduit, /) -> None:
        """In the place of another one, if there is one with that number."""
    def discard(self, number: int, /) -> None:
        """Idempotent."""

def step(
    frame: bytes | memoryview, incarnation: bytes, conduits: Conduits, now: float, /
) -> tuple[()] | tuple[list[tuple[int, int, int, bytes]], list[tuple[int, bytes]]] | None:
    """Passes on what a native engine's step has for these conduits, by the numbers of their requests. Returns the
    deltas that are not theirs, or not just the next piece of an answer, and what clients' sockets did not take; whoever
    is among either is no longer in the table.

    None: this is not a plain step of this life of an engine, and nothing was done."""
