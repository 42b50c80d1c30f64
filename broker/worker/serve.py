"""An async generator becomes an engine.

    from broker.worker import serve

    async def generate(request):
        for word in request.prompt.split():
            yield word + " "

    serve(generate, router="http://127.0.0.1:30000", models=["echo"], capacity=8)

What a generator may yield: `bytes`, passed to the client as they are; or `str`, made into OpenAI's SSE or JSON, with
a `Finish` last if it has something to say. It is cancelled (its `finally` runs) when the client leaves. It may raise
`EngineError`; any other exception is logged and answered with status 500, and the engine lives on.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from broker.types import Role
from broker.worker.answer import Answer, Finish
from broker.worker.calls import Call
from broker.worker.engine import Engine
from broker.worker.link import Load
from broker.worker.request import EngineError, Request

log = logging.getLogger(__name__)

Item = bytes | str | Finish
Generate = Callable[[Request], AsyncIterator[Item]]


class GeneratorRunner:
    """Runs up to `capacity` generators; the others wait in order, at most `max_waiting`. Owns their tasks.

    `capacity` 0: all run at once, at most `max_waiting`.
    """

    def __init__(self, generate: Generate, *, capacity: int = 0, max_waiting: int = 1024) -> None:
        if capacity < 0 or max_waiting < 0:
            raise ValueError("capacity and max_waiting must not be negative")
        self._generate = generate
        self._slots = capacity or max_waiting
        self._room = max_waiting if capacity else 0
        self._waiting: deque[Call] = deque()
        self._running: dict[Call, asyncio.Task[None]] = {}
        self.engine: Engine | None = None
        """Set by whoever made both, before the engine starts."""

    def open(self, call: Call) -> None:
        if len(self._running) < self._slots:
            self._run(call)
        elif len(self._waiting) < self._room:
            self._waiting.append(call)
        else:
            raise EngineError(429, f"{len(self._waiting)} requests are waiting already", "overloaded_error")
        self._changed()

    def abort(self, call: Call) -> None:
        task = self._running.get(call)
        if task is not None:
            task.cancel()  # keeps its slot until its `finally` has run
        elif call in self._waiting:
            self._waiting.remove(call)
            self._changed()

    def load(self) -> Load:
        return Load(len(self._running), len(self._waiting))

    def _run(self, call: Call) -> None:
        task = asyncio.get_running_loop().create_task(self._drive(call))
        self._running[call] = task
        task.add_done_callback(lambda _: self._ended(call))

    def _ended(self, call: Call) -> None:
        del self._running[call]
        while self._waiting and len(self._running) < self._slots:
            self._run(self._waiting.popleft())
        self._changed()

    async def _drive(self, call: Call) -> None:
        engine = self.engine
        assert engine is not None, "the runner was given to no engine"
        try:
            await drive(self._generate(call.request), call, engine)
        except EngineError as e:
            engine.fail(call, e)
        except Exception:
            log.exception("the generator failed on %r", call.request)
            engine.fail(call, EngineError(500, "the engine failed on this request"))

    def _changed(self) -> None:
        if self.engine is not None:
            self.engine.load_changed()


async def drive(items: AsyncIterator[Item], call: Call, engine: Engine) -> None:
    """Emits what a generator yields until it ends. On cancellation the generator's own `finally` runs first."""
    answer: Answer | None = None
    finish = Finish()
    silent = True
    try:
        async for item in items:
            silent = False
            if isinstance(item, Finish):
                answer, finish = answer or _answer(call.request), item
            elif isinstance(item, str):
                answer = answer or _answer(call.request)
                engine.emit(call, answer.text(item))
            else:
                engine.emit(call, item)
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()
    if silent:  # an answer without a word, not one without a body
        answer = _answer(call.request)
    engine.finish(call, answer.end(finish) if answer is not None else b"")


def _answer(request: Request) -> Answer:
    return Answer(request.path, request.body, stream=request.stream, id=uuid.uuid4().hex, created=int(time.time()))


def serve(
    generate: Generate,
    *,
    router: str,
    models: Sequence[str] = (),
    role: str = "mixed",
    capacity: int = 0,
    transfer: bytes = b"",
    bind: str = "",
    name: str = "",
    max_waiting: int = 1024,
    drain_s: float = 10.0,
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what runs within `drain_s`. Call it from the main thread.

    `router`: where Penstock answers HTTP; it may come later and go for a while. `models`: names it serves, none =
    any. `transfer`: opaque metadata for the peers in prefill/decode pairs, at most 7 KiB. `bind`: where frontends
    connect, by default a unix socket on Penstock's machine and a free TCP port elsewhere. `name`: what lists call it.
    """
    asyncio.run(
        serve_async(
            generate,
            router=router,
            models=models,
            role=role,
            capacity=capacity,
            transfer=transfer,
            bind=bind,
            name=name,
            max_waiting=max_waiting,
            drain_s=drain_s,
        )
    )


async def serve_async(
    generate: Generate,
    *,
    router: str,
    models: Sequence[str] = (),
    role: str = "mixed",
    capacity: int = 0,
    transfer: bytes = b"",
    bind: str = "",
    name: str = "",
    max_waiting: int = 1024,
    drain_s: float = 10.0,
    stop: asyncio.Event | None = None,
) -> None:
    """`serve` inside a loop of one's own. With `stop` given, signals are left alone."""
    runner = GeneratorRunner(generate, capacity=capacity, max_waiting=max_waiting)
    engine = Engine(
        runner,
        router=router,
        models=models,
        role=Role[role.upper()],
        capacity=capacity,
        transfer=transfer,
        bind=bind,
        name=name,
    )
    runner.engine = engine
    if stop is None:
        stop = stop_on_signals()
    engine.start()
    try:
        await stop.wait()
    finally:
        await engine.stop(drain_s)


def stop_on_signals(*signals: signal.Signals) -> asyncio.Event:
    """An event that SIGTERM and SIGINT (or the given signals) set."""
    stop = asyncio.Event()
    for number in signals or (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop
