"""Whether Redis can be used as the settings say, found out before anything is started."""

from __future__ import annotations

import asyncio

from broker.cluster.store import Store, StoreAway
from broker.config import Scheduler


def problem(settings: Scheduler) -> str | None:
    """A sentence that says why it cannot."""
    return asyncio.run(_problem(settings))


async def _problem(settings: Scheduler) -> str | None:
    store = Store(settings, "probe")
    try:
        await store.probe()
    except StoreAway as e:
        return f"scheduler.name is global, but it cannot be: {e}"
    finally:
        await store.close()
    return None
