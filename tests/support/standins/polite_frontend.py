"""The frontend, but it leaves a connection to a neighbour with fewer of them for as long as the neighbour needs."""

from __future__ import annotations

from frontend.__main__ import main
from frontend.accept import Acceptor

if __name__ == "__main__":
    Acceptor._take_what_is_left = Acceptor._listen  # type: ignore[method-assign]  # in this process, for good
    main()
