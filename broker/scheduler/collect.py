"""Asking engines over HTTP: health, kind, models, load. The answers are judged elsewhere (`broker.engines`).

Engine traffic uses no proxy from the environment, follows no redirect, and reads no more than it needs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Hashable
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import zmq

from broker.config import Manager
from broker.engines import DIALECTS, Evidence, recognise
from broker.engines.base import METRICS_PATH, MODELS_PATH
from broker.engines.pd.mooncake import (
    ENGINE_IDS_PATH,
    asks_engine_ids,
    bootstrap_address,
    engine_ids,
    with_engine_ids,
)
from broker.errors import Unhealthy
from broker.faces import PENSTOCK, Event, Face
from broker.narrator import Narrator
from broker.scheduler.native import ask_incarnation
from broker.scheduler.registration import Registration
from broker.types import EngineKind, Instance, LoadReport

logger = logging.getLogger("scheduler")

MAX_METRICS_BYTES = 8 * 1024 * 1024
MAX_ANSWER_BYTES = 1024 * 1024
JOIN_S = 3.0
"""Beyond a health check's time; a frontend waits a little longer than the two together."""
CONNECTIONS = 1024
"""To all engines together. Waiting for one counts against a question's time: hosts that hang must not use them up."""


class Answer(msgspec.Struct, frozen=True):
    status: int
    body: bytes


class Collector:
    """One HTTP session for all questions. Use as an async context manager."""

    def __init__(self, manager: Manager, context: zmq.Context[Any], face: Face = PENSTOCK) -> None:
        self._manager = manager
        self._tries = manager.health_failure_threshold if face.probes_at_once else 1
        self._narrator = Narrator(face, "scheduler")
        self._context = context
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Collector:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS),
            timeout=aiohttp.ClientTimeout(total=self._manager.health_check_timeout_secs),
            headers={"User-Agent": "penstock", "Accept-Encoding": "identity"},
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def join(self, registration: Registration, *, quiet: bool = False) -> Instance:
        """Probes a newcomer and finds out what its registration leaves open. Raises `Unhealthy`.

        `quiet`: that it does not answer is known, and not told again.
        It must pass as many health checks in a row as one that comes back, all within the time of one and `JOIN_S`.
        """
        within_s = self._manager.health_check_timeout_secs + JOIN_S
        try:
            async with asyncio.timeout(within_s):
                if registration.instance.is_native:
                    return await self._join_native(registration.instance)
                return await self._join(registration, quiet)
        except TimeoutError as e:
            url = registration.instance.url
            raise Unhealthy(f"{url} is not healthy: no answers within {within_s:g} s", url=url) from e

    async def _join(self, registration: Registration, quiet: bool) -> Instance:
        url = registration.instance.url
        first = await self._get(url + self._manager.health_check_endpoint, quiet=quiet)
        # What 404 means is known when the kind is.
        fit = (200, 404) if registration.engine in (None, EngineKind.OPENAI) else (200,)
        if first is None or first.status not in fit:
            raise self._unhealthy(url, first)
        complete = registration.engine is not None and registration.names_models
        answers = {} if complete else await self._ask(url, MODELS_PATH)
        kind = registration.engine or await self._recognise(registration, answers)
        for path in DIALECTS[kind].join_paths:
            answers |= await self._ask(url, path)
        evidence = Evidence(answers)
        host = urlsplit(url).hostname or ""
        publishes = DIALECTS[kind].publishes(evidence, f"[{host}]" if ":" in host else host)
        instance = registration.joined(kind, evidence.models(), publishes)
        if asks_engine_ids(instance):
            instance = with_engine_ids(instance, await self.engine_ids(instance))
        for _ in range(self._manager.health_success_threshold - (first.status == 200)):
            if not await self._passes(instance):
                raise self._unhealthy(url, first)
        return instance

    async def _recognise(self, registration: Registration, answers: dict[str, bytes]) -> EngineKind:
        metrics = await self._get(registration.instance.metrics_url, MAX_METRICS_BYTES)
        if metrics is not None and metrics.status == 200:
            answers = {**answers, METRICS_PATH: metrics.body}
        kind = recognise(Evidence(answers)) or EngineKind.OPENAI
        if kind is EngineKind.OPENAI and registration.has_fastdeploy_fields:
            return EngineKind.FASTDEPLOY
        return kind

    def _unhealthy(self, url: str, answer: Answer | None) -> Unhealthy:
        asked = url + self._manager.health_check_endpoint
        said = "does not answer" if answer is None else "does not answer 200 every time"
        return Unhealthy(f"{url} is not healthy: {asked} {said}", url=url)

    async def is_healthy(self, instance: Instance, tries: int | None = None) -> bool:
        """One health check: so many probes at once (by default as many as the face wants), of which one must pass."""
        for _ in range(tries or self._tries):
            if await self._passes(instance):
                return True
        return False

    async def stays_healthy(self, instance: Instance) -> bool:
        """`is_healthy`, while somebody waits for the answer: within the time in which a newcomer is probed."""
        try:
            async with asyncio.timeout(self._manager.health_check_timeout_secs + JOIN_S):
                return await self.is_healthy(instance)
        except TimeoutError:
            return False

    async def _passes(self, instance: Instance) -> bool:
        """One probe: status 200, exactly."""
        answer = await self._get(instance.url + self._manager.health_check_endpoint)
        if answer is not None and answer.status == 404 and instance.engine is EngineKind.OPENAI:
            # A server of unknown make need not have the endpoint; the engines we know do, and use 404 for trouble.
            answer = await self._get(instance.url + MODELS_PATH)
        return answer is not None and answer.status == 200

    async def incarnation(self, instance: Instance) -> bytes | None:
        """Who answers at a native engine's endpoint; None = nobody."""
        return await ask_incarnation(self._context, instance.url, self._manager.health_check_timeout_secs)

    async def models(self, instance: Instance) -> tuple[str, ...]:
        """The names it lists now; empty = it did not say."""
        return Evidence(await self._ask(instance.url, MODELS_PATH)).models()

    async def engine_ids(self, instance: Instance) -> tuple[str, ...]:
        """Of a Mooncake prefill instance, by data-parallel rank; empty = its bootstrap server does not say."""
        answer = await self._get(bootstrap_address(instance) + ENGINE_IDS_PATH)
        return engine_ids(answer.body) if answer is not None and answer.status == 200 else ()

    async def load(self, instance: Instance) -> LoadReport | None:
        """Its load by `/metrics`; None = no answer, or no load in it."""
        answer = await self._get(instance.metrics_url, MAX_METRICS_BYTES)
        if answer is None or answer.status != 200:
            return None
        return DIALECTS[instance.engine].report(answer.body)

    async def _join_native(self, instance: Instance) -> Instance:
        incarnation = await self.incarnation(instance)
        if incarnation is None:
            raise Unhealthy(f"{instance.url} is not healthy: no native engine answers there", url=instance.url)
        return msgspec.structs.replace(instance, incarnation=incarnation)

    async def post(self, url: str, body: bytes) -> Answer | None:
        """Passes a JSON body on; None = no whole answer."""
        assert self._session is not None, "used outside its context"
        try:
            headers = {"Content-Type": "application/json"}
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                return Answer(response.status, await response.content.read(MAX_ANSWER_BYTES))
        except (aiohttp.ClientError, OSError, ValueError) as e:
            logger.debug("no answer from %s: %r", url, e)
            return None

    async def _ask(self, url: str, path: str) -> dict[str, bytes]:
        answer = await self._get(url + path)
        return {path: answer.body} if answer is not None and answer.status == 200 else {}

    async def _get(self, url: str, limit: int = MAX_ANSWER_BYTES, *, quiet: bool = False) -> Answer | None:
        """None = no whole answer in time, or one longer than `limit`."""
        assert self._session is not None, "used outside its context"
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > limit:
                        return None
                return Answer(response.status, bytes(body))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
            if not quiet:
                self._narrator.tell(Event.UNANSWERED, url=url, error=str(e) or type(e).__name__)
            return None


class Errands:
    """Running questions, at most one per key. The owner closes it, which ends them."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._tasks

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, key: Hashable, errand: Coroutine[Any, Any, None]) -> None:
        """Runs it, unless the last one of that key still does: a slow engine is not asked twice at once."""
        if key in self._tasks:
            errand.close()
            return
        self._tasks[key] = task = asyncio.get_running_loop().create_task(errand)
        task.add_done_callback(lambda done: self._done(key, done))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _done(self, key: Hashable, task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("failed while at %s", key, exc_info=error)
