"""The short way of a stream that flows: from an engine's bytes to the client's socket, without a stop in between.

    an HTTP engine's sockets --- Intake ---+
                                           +--- Conduit --- the client's socket
    a native engine's steps ---- step -----+       counts, keeps what the answer's end needs

Nearly every event is the next whole chunk of an answer that has begun, for a client that has read all so far. To say so
takes far less than the way through transports, calls and sinks, which are there for everything else. So those lend
their stream to a `Conduit` while nothing else is to be said of it, and take it back

* as soon as something comes that is not whole chunks: the end, an error, a malformed piece. It is handed over as it is;
  and what an HTTP engine's socket has to tell besides data (its end, an error) is left for the transport to read.
* as soon as the client's socket does not take all: the rest is its transport's, with all its limits.
* whenever they have something to do themselves: pause, cancel, time out, end.

What it has counted by then is added to what they had (`Forward`). Both sockets stay their transports', which close them
only after `connection_lost`, and that takes the stream back, too: so no descriptor in use is ever another connection's
(tests/frontend/test_conduit_ends.py holds the loops to it).

    _conduit.h   what they share
    _conduit.c   one stream: what is counted and kept of it, and the sending
    _intake.c    the sockets of HTTP engines
    _step.c      the steps of native ones

Where these are not compiled, and over TLS, there is no short way, and everything goes the long one.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

from shm.compiled import is_wanted

compiled: ModuleType | None = None
"""The way itself; None: there is none, or it is not wanted."""
if is_wanted():
    with contextlib.suppress(ImportError):
        from frontend import _conduit

        compiled = _conduit
