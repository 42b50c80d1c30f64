"""What the parts of Penstock say to each other: instances, load reports."""

from __future__ import annotations

from enum import IntEnum, StrEnum

import msgspec


class Role(IntEnum):
    """What an instance does; the numbers are FastDeploy's (`role` in its `/register`)."""

    MIXED = 0
    PREFILL = 1
    DECODE = 2


class EngineKind(StrEnum):
    """The dialect an instance speaks."""

    FASTDEPLOY = "fastdeploy"
    VLLM = "vllm"
    SGLANG = "sglang"
    OPENAI = "openai"
    NATIVE = "native"


class Connector(StrEnum):
    """How a prefill and a decode instance come together; `broker.engines.pd` holds one file for each."""

    DISAGGREGATE_INFO = "disaggregate_info"  # FastDeploy
    BOOTSTRAP = "bootstrap"  # SGLang
    NIXL = "nixl"  # vLLM
    MOONCAKE = "mooncake"  # vLLM
    P2P_NCCL = "p2p_nccl"  # vLLM up to 0.23
    NATIVE = "native"


class Trust(IntEnum):
    """How far the load of an instance may be believed; policies respect it."""

    STALE = 0  # nothing heard, or too long ago: only live counters count
    APPROX = 1  # polled, or a gap was seen
    EXACT = 2  # pushed by the engine, no gap


class FastDeployFields(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a FastDeploy registration carries beyond host, port and role.

    Carried as registered; `None` = not sent, which `/registered` shows as null. Values are normalised to
    strings as the original does (`rdma_ports: [7100, "7101"]` becomes `["7100", "7101"]`).
    """

    connector_port: str = ""
    engine_worker_queue_port: str = ""
    transfer_protocol: list[str] | None = None
    rdma_ports: list[str] | None = None
    device_ids: list[str] | None = None
    metrics_port: str = ""
    tp_size: int = 0
    version: str = ""
    """Of the weights; prefill engines ask for the decode instances of theirs."""
    is_paused: bool = False
    """It takes requests, and begins none before it is resumed."""


class PairFields(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the router itself must know of an instance to make pairs with it; the rest is opaque `transfer`."""

    connector: Connector | None = None
    """As registered; None = the one that its kind of engine has by default."""
    bootstrap_port: int = 0
    """Of SGLang's or Mooncake's bootstrap server; 0 = not said, so theirs: 8998."""
    zmq_address: str = ""
    """P2P-NCCL: `ip:port` of its ROUTER, which request ids carry."""
    engine_ids: tuple[str, ...] = ()
    """Mooncake: by data-parallel rank, as the bootstrap server of a prefill instance says."""


class Instance(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One engine behind one address. Its msgpack form is the blob in shared memory (at most 8 KiB)."""

    url: str
    """Identity. `http://host:port` for HTTP engines, the data endpoint (`tcp://…`, `ipc://…`) for native ones."""
    role: Role = Role.MIXED
    engine: EngineKind = EngineKind.OPENAI
    models: tuple[str, ...] = ()
    """Model names it serves; empty = unknown, which makes it a candidate for every model."""
    capacity: int = 0
    """Requests it runs at once; 0 = unknown."""
    incarnation: bytes = b""
    """Native engines: 16 bytes drawn at each start. Empty for HTTP engines."""
    metrics_url: str = ""
    """Where `/metrics` is polled; empty = the engine publishes its load, or offers none."""
    load_endpoint: str = ""
    """ZMQ endpoint at which the engine publishes SGLang's LoadStat; empty = none."""
    transfer: bytes = b""
    """Opaque transfer metadata (NCCL, RDMA, device ids) exactly as registered; carried, never read."""
    fastdeploy: FastDeployFields | None = None
    pair: PairFields | None = None
    name: str = ""
    """What people call it; native engines say it in their hello."""
    left_open: tuple[str, ...] = ()
    """What its registration did not say, so that probing had the word: of `engine`, `models`, `load_endpoint`."""

    @property
    def is_native(self) -> bool:
        return self.engine is EngineKind.NATIVE

    @property
    def asks_models(self) -> bool:
        """Its models were found by asking it, so they are asked for again from time to time."""
        return "models" in self.left_open


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine said of itself, once. `None` = it did not say."""

    running: int | None = None
    waiting: int | None = None
    waiting_tokens: int | None = None
    kv_permille: int | None = None
    """KV-cache use in 1/1000."""
    capacity: int | None = None
    trust: Trust = Trust.EXACT
