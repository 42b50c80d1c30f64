"""What a config.yaml means to FastDeploy's router: unknown keys are passed over, `""` is not set, and much is optional.

Unlike there, 0 is a value wherever it makes sense as one, and an unknown policy stops the start.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec

from broker import addresses, config
from broker.config import Tree
from broker.errors import ConfigMalformed

DEFAULTS: Tree = {
    # Every interface, of both families: the original ignores `server.host`.
    "server": {"host": "::" if socket.has_dualstack_ipv6() else "0.0.0.0", "workers": 1},
    "scheduler": {"policy": "request_num", "prefill-policy": "process_tokens"},
    "manager": {"health-failure-threshold": 1, "health-success-threshold": 1, "expire-after-secs": 0.0},
}
LEVELS = ("debug", "info", "warn", "error")
_IGNORED = {("server", "host"), ("server", "name"), ("server", "mode"), ("server", "compat")}


def read(tree: Tree) -> tuple[Tree, list[str]]:
    """Our tree for theirs, with the defaults that differ; and a sentence for everything that is passed over.

    Raises `ConfigMalformed` for a section that is none. Values of wrong types are for `broker.config` to refuse.
    """
    types = _types()
    doubts: list[str] = []
    kept: Tree = {section: dict(keys) for section, keys in DEFAULTS.items()}
    for section, keys in tree.items():
        if keys is None:
            continue
        if not isinstance(keys, dict):
            if section in {name for name, _ in types}:
                raise ConfigMalformed(f"section {section!r} must be a mapping of keys")
            doubts.append(f"config: unknown section {section!r} is ignored")
            continue
        for key, value in keys.items():
            if (section, key) not in types:
                doubts.append(f"config: unknown key '{section}.{key}' is ignored")
            elif (section, key) in _IGNORED or value is None or value == "":
                continue
            elif value == 0 and not _takes(types[section, key], value):
                doubts.append(f"config: '{section}.{key}' cannot be 0; its default is used")
            else:
                kept.setdefault(section, {})[key] = _whole(types[section, key], value)
    url = kept.get("scheduler", {}).get("tokenizer-url")
    if isinstance(url, str):
        try:
            addresses.service(url)
        except ValueError as e:
            doubts.append(f"config: 'scheduler.tokenizer-url' {e}; prompts are cut into characters")
            del kept["scheduler"]["tokenizer-url"]
    log = kept.get("log", {})
    if log.get("output") != "file":
        log.pop("output", None)  # whatever else it says means standard output
    if "level" in log and log["level"] not in LEVELS:
        doubts.append(f"config: 'log.level' is one of {', '.join(LEVELS)}; its default is used")
        del log["level"]
    return kept, doubts


def _whole(kind: Any, value: Any) -> Any:
    """A number written with a fraction of nothing where a whole one is wanted, as YAML of other programs has it."""
    if isinstance(value, float) and value.is_integer() and not _takes(kind, value):
        return int(value)
    return value


def _types() -> dict[tuple[str, str], Any]:
    sections = {section.encode_name: section.type for section in msgspec.structs.fields(config.Config)}
    return {
        (name, key.encode_name): key.type
        for name, section in sections.items()
        for key in msgspec.structs.fields(section)
    }


def _takes(kind: Any, value: object) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True
