"""The simulated engine as a native (ZMQ) engine: the SDK's `Runner` on top of the model."""

from __future__ import annotations

import asyncio

from broker.worker.calls import Call
from broker.worker.engine import Engine
from broker.worker.link import Load
from broker.worker.request import EngineError
from broker.worker.sim import pd
from broker.worker.sim.engine import Job, SimulatedEngine
from broker.worker.sim.text import Prompt

GARBAGE = b"\xc1 this is no msgpack"


class CallOut:
    """One answer on its way through the SDK; applies the faults of the wire."""

    def __init__(self, runner: NativeRunner, call: Call) -> None:
        self._runner = runner
        self._engine = runner.engine
        self._call = call

    def emit(self, data: bytes) -> None:
        self._spoil()
        self._engine.emit(self._call, data)

    def finish(self, data: bytes) -> None:
        self._spoil()
        self._engine.finish(self._call, data)
        self._runner.forget(self._call)

    def fail(self, error: EngineError) -> None:
        self._engine.fail(self._call, error)
        self._runner.forget(self._call)

    def _spoil(self) -> None:
        fault = self._runner.sim.faults.malformed
        if fault == "gap" and self._call.sequence == 1:
            self._call.sequence += 1
        elif fault == "frame" and self._call.sequence == 0:
            self._engine.data.send([self._call.frontend.identity, GARBAGE])


class NativeRunner:
    """What the SDK's engine tells of requests and aborts."""

    def __init__(self, sim: SimulatedEngine, me: pd.Identity, handover: pd.Handover) -> None:
        self.sim = sim
        self._me = me
        self._handover = handover
        self._jobs: dict[Call, Job] = {}
        self._fetching: dict[Call, asyncio.Task[None]] = {}
        self.engine: Engine
        """Set by whoever made both."""

    def open(self, call: Call) -> None:
        prompt = self.sim.admit(call.request)
        if self._me.role == "mixed":
            self._submit(call, prompt, pd.Transfer())
        else:
            self._fetching[call] = asyncio.get_running_loop().create_task(self._fetch(call, prompt))

    async def _fetch(self, call: Call, prompt: Prompt) -> None:
        """A decode gets its prompt's computation first."""
        try:
            self._submit(call, prompt, await pd.native(self._me, self._handover, call.request, prompt))
        except EngineError as error:
            self.engine.fail(call, error)
        finally:
            del self._fetching[call]

    def _submit(self, call: Call, prompt: Prompt, transfer: pd.Transfer) -> None:
        self._jobs[call] = self.sim.submit(call.request, prompt, CallOut(self, call), transfer)
        self.engine.load_changed()

    def abort(self, call: Call) -> None:
        if (fetching := self._fetching.get(call)) is not None:
            fetching.cancel()
        job = self._jobs.pop(call, None)
        if job is not None:
            self.sim.abort(job)
            self.engine.load_changed()

    def forget(self, call: Call) -> None:
        self._jobs.pop(call, None)

    def load(self) -> Load:
        return self.sim.load()

    def after_step(self) -> None:
        """The model took a step: its deltas leave as one message per frontend."""
        self.engine.flush_step()
        self.engine.load_changed()

    def after_faults(self) -> None:
        self.engine.set_publishing(not self.sim.faults.silent_metrics)
