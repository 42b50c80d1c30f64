"""What all requests of a frontend share, and what may happen to all of them at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import Final

from broker.aborting import by_name
from broker.config import Config
from broker.counters import FrontendCounters
from broker.errors import Aborted, PenstockError
from broker.faces import face_of
from broker.policies import in_use
from broker.route import RouteRequest
from broker.types import EngineKind, Instance
from frontend.decisions import MOST_PATH, Decisions, Record, Step, cut
from frontend.dispatch import Chooser
from frontend.forward import Forward
from frontend.pairings import Pairings
from frontend.story import Story
from frontend.tokenizer import Tokenizer
from frontend.upstream.base import Sink, Upstream, UpstreamRequest, Upstreams

_MOST_PATH: Final = MOST_PATH  # one that the compiler knows
_NATIVE: Final = EngineKind.NATIVE
"""To ask an instance for its engine takes a tenth of what its `is_native` does."""


class Forwarder(Upstreams):
    """Makes the requests of a frontend, and owns the set of those under way."""

    def __init__(
        self,
        config: Config,
        dispatcher: Chooser,
        counters: FrontendCounters,
        http: Upstream,
        native: Upstream,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` in seconds; not the loop's, which uvloop keeps in whole milliseconds."""
        self.dispatcher = dispatcher
        self.counters = counters
        self.loop = loop
        self.clock = clock
        self.attempts = config.upstream.attempts
        self.first_byte_s = config.timeouts.first_byte_secs
        self.idle_s = config.timeouts.idle_secs
        scheduler = config.scheduler
        pairs = f"{scheduler.prefill_policy},{scheduler.decode_policy}"
        self.policy = pairs if config.server.splitwise else scheduler.policy
        self.policies = in_use(config)
        self.pairs = config.server.splitwise
        self.face = face_of(config)
        self.pairings = Pairings()
        self.tokenizer = Tokenizer.wanted(config, http, loop)
        self.live: set[Forward] = set()
        # A face that gives requests no names has nothing to ask by.
        kept = config.server.decisions if self.face.names_requests else 0
        self.decisions = Decisions(kept) if kept else None
        header = config.server.decision_header if self.face.names_requests else "never"
        self._always_explains = header == "always"
        self._explains_if_asked = header != "never"
        self._http = http
        self._native = native

    def forward(
        self,
        ident: bytes,
        route: RouteRequest,
        request: UpstreamRequest,
        sink: Sink,
        story: Story | None = None,
        *,
        asks_why: bool = False,
    ) -> Forward:
        """A request that has not begun; nothing is held until `begin`. `asks_why`: its client wants to be told why its
        instance was chosen."""
        explains = self._always_explains or (asks_why and self._explains_if_asked)
        steps: list[Step] | None = [] if explains else None
        path = request.path
        if len(path) > _MOST_PATH:
            path = cut(path)
        asked = route, request
        return Forward(self, ident, request.request_id, path, route.model, sink, asked, story, explains, steps)

    def upstream(self, instance: Instance) -> Upstream:
        return self._native if instance.engine is _NATIVE else self._http

    def end_requests(self, asked: list[str] | None) -> list[tuple[str, int]]:
        """Ends those under way that somebody asked to abort (None: all), each with an explicit error.

        Returns the ids as they were asked for, or the requests' own, and the tokens that their clients had got.
        """
        names = None if asked is None else by_name(asked)
        ended = []
        for forward in list(self.live):
            ident = forward.ident if names is None else next((names[n] for n in forward.names if n in names), None)
            if ident is not None:
                ended.append((ident, forward.tokens_so_far))
                forward.abort(Aborted("the request was aborted"))
        return ended

    def under_way(self, names: AbstractSet[str]) -> Iterator[Record]:
        """The requests that go by one of these names and have not ended."""
        return (forward.record() for forward in self.live if not names.isdisjoint(forward.names))

    def end_all(self, error: PenstockError) -> None:
        """Ends every request under way, each with an explicit error."""
        for forward in list(self.live):
            forward.abort(error)
