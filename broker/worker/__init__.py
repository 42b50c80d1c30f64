"""What runs on the engine's side: the SDK for native engines, and the simulated engine (`broker.worker.sim`)."""

from broker.worker.answer import Answer, Finish
from broker.worker.calls import Call, Runner
from broker.worker.engine import Engine
from broker.worker.link import Load
from broker.worker.request import EngineError, Request
from broker.worker.serve import serve, serve_async

__all__ = ["Answer", "Call", "Engine", "EngineError", "Finish", "Load", "Request", "Runner", "serve", "serve_async"]
