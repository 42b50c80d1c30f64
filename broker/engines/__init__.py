"""Engine dialects: what the bytes of each kind of engine mean. Pure; sockets are elsewhere."""

from __future__ import annotations

from broker.engines.base import Dialect, Evidence
from broker.engines.fastdeploy import FastDeploy
from broker.engines.native import Native
from broker.engines.openai import OpenAI
from broker.engines.sglang import SGLang
from broker.engines.vllm import VLLM
from broker.types import EngineKind

__all__ = ["DIALECTS", "Dialect", "Evidence", "recognise"]

DIALECTS: dict[EngineKind, Dialect] = {
    dialect.kind: dialect for dialect in (FastDeploy(), VLLM(), SGLang(), OpenAI(), Native())
}


def recognise(evidence: Evidence) -> EngineKind | None:
    """The kind whose marks a server bears; None = it bears none. The general ones are asked last."""
    for kind, dialect in DIALECTS.items():
        if dialect.recognises(evidence):
            return kind
    return None
