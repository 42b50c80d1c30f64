"""What a config.yaml means to FastDeploy's router: unknown keys are passed over, `""` is not set, and much is optional.

Unlike there, 0 is a value wherever it makes sense as one, and an unknown policy stops the start.
"""

from __future__ import annotations

import socket
from typing import Any

import msgspec

from broker import config
from broker.config import Tree

DEFAULTS: Tree = {
    # Every interface, of both families: the original ignores `server.host`.
    "server": {"host": "::" if socket.has_dualstack_ipv6() else "0.0.0.0", "workers": 1},
    "scheduler": {"policy": "request_num", "prefill-policy": "process_tokens"},
    "manager": {"health-failure-threshold": 1, "health-success-threshold": 1, "expire-after-secs": 0.0},
}
_IGNORED = {("server", "host"), ("server", "name"), ("server", "mode"), ("server", "compat")}


def read(tree: Tree) -> tuple[Tree, list[str]]:
    """Our tree for theirs, with the defaults that differ; and a sentence for everything that is passed over."""
    types = _types()
    doubts: list[str] = []
    kept: Tree = {section: dict(keys) for section, keys in DEFAULTS.items()}
    for section, keys in tree.items():
        if not isinstance(keys, dict):
            if keys is not None:
                doubts.append(f"config: section {section!r} is no mapping and is ignored")
            continue
        for key, value in keys.items():
            if (section, key) not in types:
                doubts.append(f"config: unknown key '{section}.{key}' is ignored")
            elif (section, key) in _IGNORED or value is None or value == "":
                continue
            elif value == 0 and not _takes(types[section, key], value):
                doubts.append(f"config: '{section}.{key}' cannot be 0; its default is used")
            else:
                kept.setdefault(section, {})[key] = value
    log = kept.get("log", {})
    if log.get("output") != "file":
        log.pop("output", None)  # whatever else it says means standard output
    return kept, doubts


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
