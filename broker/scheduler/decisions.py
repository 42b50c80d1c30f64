"""Why a request went where it went: the frontend that served it knows, so all are asked."""

from __future__ import annotations

import msgspec

from broker import wire
from broker.scheduler.asking import Asking


async def explained(ident: str, asking: Asking) -> tuple[int, bytes]:
    """Status and JSON body for `GET /explain/ID`: the requests of that name, and how many frontends said nothing."""
    parts, silent = await asking.ask(lambda ask: wire.TellDecisions(ask, ident))
    told = [msgspec.Raw(body) for part in parts if isinstance(part, wire.Decided) for body in part.requests]
    return 200, msgspec.json.encode({"requests": told, "silent_frontends": silent})
