"""One typed, frozen tree of settings, resolved once by the supervisor.

File (YAML, FastDeploy's keys load unchanged), then environment (`PENSTOCK_SERVER_PORT=…`: section and key in
capitals, dashes as underscores), then flags; the later one wins. Unknown keys are errors that name the key and
the nearest known one. Times are in the unit of the key's name; sizes in bytes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import msgspec
import yaml
from msgspec import Meta

from broker import addresses
from broker.errors import ConfigError, ConfigMalformed, ConfigUnreadable, PortMissing

Port = Annotated[int, Meta(ge=1, le=65535)]
_MOST = 1e9
"""Of any number with a fraction. As a time it is 30 years; `.inf`, which neither timers nor JSON know, is beyond it."""
Positive = Annotated[float, Meta(gt=0, le=_MOST)]
NotNegative = Annotated[float, Meta(ge=0, le=_MOST)]
Count = Annotated[int, Meta(ge=1)]

UNUSABLE_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What the YAML reader raises: its own errors, and others' for 2024-13-45, which is no date, for bytes that are no
text, and for a thousand brackets."""

PolicyName = Literal[
    "random",
    "round_robin",
    "power_of_two",
    "process_tokens",
    "request_num",
    "fd_metrics_score",
    "fd_remote_metrics_score",
    "cache_aware",
    "remote_cache_aware",
    "prefix_cost",
]
"""FastDeploy's nine names and ours."""


def _check(key: str, value: str, form: Callable[[str], object]) -> None:
    """Of an address, which may be left empty. A `ValueError` becomes a `ConfigError` that names the section, too."""
    if value:
        try:
            form(value)
        except ValueError as e:
            raise ValueError(f"{key} {e}") from e


class Section(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Keys are written with dashes; a section of the file is one of these."""


class Server(Section, frozen=True, forbid_unknown_fields=True):
    compat: Literal["penstock", "fd-router"] = "penstock"
    """The face it shows (`broker.faces`); set by `--compat`."""
    host: str = "0.0.0.0"
    port: Port = 30000
    name: str = ""
    """FastDeploy's; shown in the banner."""
    mode: Literal["debug", "release", "test"] = "release"
    """FastDeploy's; accepted and without effect."""
    splitwise: bool = False
    """Prefill/decode disaggregation: only prefill and decode instances may register."""
    workers: Annotated[int, Meta(ge=1, le=1024)] = 2
    """Frontend processes."""
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 64 * 1024 * 1024
    max_receiving_bytes: Annotated[int, Meta(ge=1024)] = 1024 * 1024 * 1024
    """What has come of all bodies that a frontend is receiving, together; no less than `max-body-bytes`. Beyond it
    the one that grows is answered 503. A body that comes in one read does not count."""
    backlog: Annotated[int, Meta(ge=1, le=65535)] = 4096
    drain_secs: NotNegative = 15.0
    """How long running streams may go on after SIGTERM."""
    decisions: Annotated[int, Meta(ge=0, le=1 << 20)] = 1024
    """Requests of which each frontend remembers why they went where they went (`penstock explain`), and as many again
    that waited, were moved or failed; 0 = none. 2 KB for each, and 32 bytes for each candidate it had."""
    decision_header: Literal["never", "asked", "always"] = "asked"
    """Which answers say so in `X-Penstock-Decision`, instances' addresses included; asked = those to requests with
    `X-Penstock-Explain: 1`. An error says it, too, if its request was sent to an instance."""
    lean_path: bool = True
    """Whether inference requests go around ASGI. Both ways do the same; this one costs a fraction."""

    def __post_init__(self) -> None:
        if self.max_receiving_bytes < self.max_body_bytes:
            raise ValueError("max-receiving-bytes must not be less than max-body-bytes")


class Scheduler(Section, frozen=True, forbid_unknown_fields=True):
    name: Literal["local", "global"] = "local"
    """FastDeploy's: `global` lends and borrows room among the hosts of one Redis and topic (docs/cluster.md)."""
    host: str = "127.0.0.1"
    """Of Redis, as the next three."""
    port: Port = 6379
    db: Annotated[int, Meta(ge=0)] = 0
    password: str = ""
    topic: Annotated[str, Meta(min_length=1, max_length=128)] = "default"
    """Only hosts with the same one know each other."""
    min_load_score: Count = 3
    """Requests that must wait at a host before others help it."""
    load_shards_num: Annotated[int, Meta(ge=1, le=1024)] = 1
    """Sorted sets that the hosts' load is split into; the same at all of them."""
    unreachable: Literal["exit", "local"] = "exit"
    """What a start with `global` does when Redis cannot be used. Later on, hosts always go on alone."""
    policy: PolicyName = "prefix_cost"
    prefill_policy: PolicyName = "prefix_cost"
    decode_policy: PolicyName = "request_num"
    waiting_weight: NotNegative = 1.0
    seed: int = 0
    """Seed of the policies' draws; frontend k uses (seed, k)."""
    eviction_interval_secs: Positive = 60.0
    eviction_duration_mins: Positive = 30.0
    cache_block_size: Count = 64
    """Characters, or tokens, of a block of the prefix index."""
    prefix_blocks: Annotated[int, Meta(ge=16, le=1 << 28)] = 1 << 20
    """Blocks that the prefix index remembers, for 24 bytes each."""
    prefix_blocks_per_prompt: Annotated[int, Meta(ge=1, le=1 << 16)] = 1024
    """Beginnings of prompts longer than this are as if they were new."""
    tokenizer_url: str = ""
    """FastDeploy's tokenizer service; `http://` and the path `/tokenize` may be left out. Empty = prompts are cut into
    characters."""
    tokenizer_timeout_secs: Positive = 2.0
    balance_abs_threshold: NotNegative = 1.0
    balance_rel_threshold: NotNegative = 0.2
    hit_ratio_weight: NotNegative = 1.0
    load_balance_weight: NotNegative = 1.0
    stats_interval_secs: Positive = 5.0
    instance_capacity: Annotated[int, Meta(ge=0)] = 0
    """Requests at once of instances that do not say it themselves; 0 = full only when their reports show it."""
    queue_max_tickets: Count = 50_000
    """Requests that may wait for room at saturated instances, on this host; beyond it they are answered 429."""
    queue_max_tokens: Count = 500_000_000
    """Prompt tokens that those may have together."""
    queue_timeout_secs: Positive = 900.0
    """Longest wait for room, then 503; FastDeploy's `scheduler-ttl`."""
    queue_aging_secs: NotNegative = 10.0
    """A waiting request is passed only by those of the next higher priority that came less than this after it."""
    rescues_per_sec: NotNegative = 4.0
    """Requests without a first byte that a frontend moves from a full engine to an idle one; 0 = none."""
    fairness_header: str = "authorization"
    """Requests with the same value of this header share their turns; empty = all do."""
    prefill_tokens_per_sec: Positive = 5000.0
    """How fast an engine reads a prompt: what a cold cache costs, weighed against a wait."""

    def __post_init__(self) -> None:
        _check("tokenizer-url", self.tokenizer_url, addresses.service)


class Manager(Section, frozen=True, forbid_unknown_fields=True):
    register_path: str = ""
    """Instances to register at the start, relative to the working directory; tried again until they answer."""
    health_failure_threshold: Count = 3
    health_success_threshold: Count = 2
    health_check_timeout_secs: Positive = 5.0
    health_check_interval_secs: Positive = 5.0
    health_check_endpoint: str = "/health"
    """Path, and query, that are appended to an instance's URL."""
    metrics_interval_secs: Positive = 1.0
    """Period of `/metrics` polling for engines that publish nothing."""
    stale_after_secs: Positive = 5.0
    """A load report older than this is treated as unknown."""
    expire_after_secs: NotNegative = 600.0
    """An instance that stays unhealthy this long is forgotten; 0 = at once."""

    def __post_init__(self) -> None:
        _check("health-check-endpoint", self.health_check_endpoint, addresses.target)


class Log(Section, frozen=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warn", "error"] = "info"
    output: Literal["stdout", "file"] = "stdout"
    """`file` = `logs/penstock.log` under the working directory."""
    max_age_days: Count = 7
    max_total_size_mb: Count = 500
    cleanup_interval_secs: Positive = 3600.0


class Shm(Section, frozen=True, forbid_unknown_fields=True):
    dir: str = "/dev/shm"
    frontends: Annotated[int, Meta(ge=1, le=1024)] = 64
    """Rows of counters: frontends that may live at once, swapped ones included."""
    slots: Annotated[int, Meta(ge=1, le=32766)] = 1024
    """Instances that may be registered at once, resting ones included; no more than the prefix index tells apart."""
    rest_secs: NotNegative = 30.0
    """A slot rests this long after its last request before another instance may have it."""


class Engines(Section, frozen=True, forbid_unknown_fields=True):
    """Where engines reach the scheduler over ZMQ, beside the run directory's own ipc sockets."""

    control_bind: str = ""
    """For example `tcp://0.0.0.0:30100`; empty = engines of this machine only."""
    p2p_nccl_bind: str = ""
    """For example `tcp://0.0.0.0:30001`: where vLLM's P2pNcclConnector (`proxy_ip`, `proxy_port`) registers engines."""
    load_bind: str = ""
    """For example `tcp://0.0.0.0:30101`."""

    def __post_init__(self) -> None:
        _check("control-bind", self.control_bind, addresses.bind)
        _check("p2p-nccl-bind", self.p2p_nccl_bind, addresses.bind)
        _check("load-bind", self.load_bind, addresses.bind)


class Timeouts(Section, frozen=True, forbid_unknown_fields=True):
    connect_secs: Positive = 5.0
    first_byte_secs: NotNegative = 0.0
    """0 = off: an unstreamed answer's first byte is its last."""
    idle_secs: NotNegative = 600.0
    """Longest silence within a stream; 0 = off."""
    prefill_secs: NotNegative = 0.0
    """Prefill/decode pairs: from the sending until prefill is done, by its own answer; 0 = off, as the next two."""
    decode_secs: NotNegative = 0.0
    """From then until decode's first byte, which is an unstreamed answer's last."""
    pair_secs: NotNegative = 0.0
    """From the sending until the end of the answer."""


class Upstream(Section, frozen=True, forbid_unknown_fields=True):
    attempts: Annotated[int, Meta(ge=1, le=10)] = 3
    """Tries in all, before the first byte."""
    connections: Count = 1024
    """Open connections to one HTTP engine, per frontend."""
    stream_buffer_bytes: Annotated[int, Meta(ge=4096)] = 4 * 1024 * 1024
    """What one slow client may hold before its stream is paused (HTTP engines) or ended (native engines)."""
    breaker_failures: Count = 3
    """Failures in a row that open an instance's breaker in a frontend."""
    breaker_secs: Positive = 5.0
    """How long it stays open before one request tries again."""


class Models(Section, frozen=True, forbid_unknown_fields=True):
    aliases: dict[str, str] = {}
    """Name a client may use -> name that the instances serve."""


class Config(Section, frozen=True, forbid_unknown_fields=True):
    server: Server = Server()
    scheduler: Scheduler = Scheduler()
    manager: Manager = Manager()
    log: Log = Log()
    shm: Shm = Shm()
    engines: Engines = Engines()
    timeouts: Timeouts = Timeouts()
    upstream: Upstream = Upstream()
    models: Models = Models()


Tree = dict[str, Any]


def load(
    path: str | Path | None,
    env: Mapping[str, str],
    flags: Mapping[tuple[str, str], object],
    *,
    prepare: Callable[[Tree], Tree] = lambda tree: tree,
    needs_port: bool = False,
) -> Config:
    """The settings in force. `flags` maps (section, key) to a value; None = not given.

    `prepare` turns what the file holds into what it means; `needs_port`: there is no default for it.
    Raises `ConfigError` with a sentence that names file and key.
    """
    tree = prepare(_read(Path(path)) if path else {})
    for section, key in known():
        name = f"PENSTOCK_{section}_{key}".upper().replace("-", "_")
        text = env.get(name)
        if text is not None:
            # A password of digits is one all the same.
            _section(tree, section)[key] = text if key == "password" else _value(text, name)
    for (section, key), value in flags.items():
        if value is not None:
            _section(tree, section)[key] = value
    if needs_port and _section(tree, "server").get("port") is None:
        raise PortMissing("no port was given")
    return build(tree, source=str(path) if path else "settings")


def build(tree: Tree, source: str = "settings") -> Config:
    """Checks a tree of plain values; None stands for a default, as an empty key in YAML does."""
    _refuse_unknown(tree, source)
    kept = {s: {k: v for k, v in keys.items() if v is not None} for s, keys in tree.items() if keys is not None}
    port = kept.get("server", {}).get("port")
    if isinstance(port, str) and port.strip().isdigit():  # FastDeploy's example file quotes it
        kept["server"]["port"] = int(port)
    try:
        return msgspec.convert(kept, Config)
    except msgspec.ValidationError as e:
        raise ConfigMalformed(f"{source}: {_explained(str(e))}") from e


def dump(config: Config) -> bytes:
    """JSON for the child processes; `parse` is its inverse."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2)


def parse(data: bytes) -> Config:
    return msgspec.json.decode(data, type=Config)


def _read(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigUnreadable(f"cannot read the config file {path}: {e.strerror}") from e
    except UNUSABLE_YAML as e:
        raise ConfigMalformed(f"{path} is not valid YAML: {e}") from e
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigMalformed(f"{path}: the top level must be a mapping of sections")
    return cast("Tree", tree)


def _value(text: str, name: str) -> object:
    try:
        return yaml.safe_load(text)
    except UNUSABLE_YAML as e:
        raise ConfigMalformed(f"{name} is not valid YAML: {e}") from e


def _section(tree: Tree, name: str) -> Tree:
    section = tree.get(name)
    if section is None:
        section = tree[name] = {}
    if not isinstance(section, dict):
        raise ConfigError(f"section {name} must be a mapping")
    return section


def known() -> list[tuple[str, str]]:
    """Every (section, key)."""
    return [
        (section.encode_name, key.encode_name)
        for section in msgspec.structs.fields(Config)
        for key in msgspec.structs.fields(section.type)
    ]


def _refuse_unknown(tree: Tree, source: str) -> None:
    every = known()
    sections = sorted({section for section, _ in every})
    for section, keys in tree.items():
        if section not in sections:
            raise ConfigError(f"{source}: unknown section {section!r}{_nearest(str(section), sections)}")
        if keys is None:
            continue
        if not isinstance(keys, dict):
            raise ConfigError(f"{source}: section {section!r} must be a mapping")
        names = [key for s, key in every if s == section]
        for key in keys:
            if key not in names:
                raise ConfigError(f"{source}: unknown key '{section}.{key}'{_nearest(str(key), names)}")


def _explained(error: str) -> str:
    """The decoder's sentence, and for a word that is none of a choice those that are."""
    place = re.search(r"Invalid enum value .* - at `\$\.([a-z-]+)\.([a-z-]+)`", error)
    if place is None:
        return error
    sections = {section.encode_name: section.type for section in msgspec.structs.fields(Config)}
    kinds = {key.encode_name: key.type for key in msgspec.structs.fields(sections[place[1]])}
    return f"{error}; known: {', '.join(map(str, get_args(kinds[place[2]])))}"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
