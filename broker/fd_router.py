"""The command `fd-router`: `penstock serve --compat fd-router` behind the flags of FastDeploy's Go router.

Go's rules: one or two dashes, `-name value` or `-name=value`, booleans take a value only after `=`, and the first word
that is no flag ends the flags.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence

USAGE = """\
Usage of fd-router:
  -V\tprint version information and exit (shorthand)
  -config_path string
    \tpath to the YAML configuration file
  -port string
    \tport to listen on
  -splitwise
    \tprefill/decode disaggregation
  -version
    \tprint version information and exit
"""
_TEXTS = ("port", "config_path")
_SWITCHES = ("splitwise", "version", "V")
_TRUE = frozenset(("1", "t", "T", "TRUE", "true", "True"))
_FALSE = frozenset(("0", "f", "F", "FALSE", "false", "False"))


class Usage(Exception):
    """The command line cannot be used; the message says why. Empty: help was asked for."""


def parse(arguments: Sequence[str]) -> dict[str, str | bool]:
    """The flags given. Raises `Usage`."""
    found: dict[str, str | bool] = {}
    left = list(arguments)
    while left and left[0].startswith("-") and left[0] != "-":
        word = left.pop(0)
        if word == "--":
            break
        name, equals, value = word.removeprefix("-").removeprefix("-").partition("=")
        if not name or name.startswith("-"):
            raise Usage(f"bad flag syntax: {word}")
        if name in _SWITCHES:
            if equals and value not in _TRUE | _FALSE:
                raise Usage(f'invalid boolean value "{value}" for -{name}: parse error')
            found[name] = not equals or value in _TRUE
        elif name in _TEXTS:
            if not equals:
                if not left:
                    raise Usage(f"flag needs an argument: -{name}")
                value = left.pop(0)
            found[name] = value
        elif name in ("h", "help"):
            raise Usage
        else:
            raise Usage(f"flag provided but not defined: -{name}")
    return found


def version() -> str:
    facts = {
        "version": importlib.metadata.version("penstock"),
        "commit": "unknown",
        "dirty": "false",
        "vcsTime": "unknown",
        "module": "penstock",
    }
    return "golang-router\n" + "".join(f"  {name + ':':<11}{fact}\n" for name, fact in facts.items())


def main() -> None:
    try:
        flags = parse(sys.argv[1:])
    except Usage as e:
        if reason := str(e):
            print(reason, file=sys.stderr)
        print(USAGE, end="", file=sys.stderr)
        sys.exit(2 if reason else 0)
    if flags.get("version") or flags.get("V"):
        print(version(), end="")
        sys.exit(0)
    sys.exit(serve(flags))


def serve(flags: dict[str, str | bool]) -> int:
    """Runs until told to stop; returns the exit code."""
    from broker import cli, supervisor  # a second of imports, which help and version need not wait for
    from broker.errors import ConfigError, PenstockError
    from broker.faces import FD_ROUTER

    try:
        settings, doubts = cli.settle(
            FD_ROUTER,
            port=flags.get("port"),
            splitwise=bool(flags.get("splitwise")),
            config_path=str(flags.get("config_path") or ""),
        )
        return supervisor.serve(settings, doubts=doubts)
    except PenstockError as e:
        fault = port_fault(str(flags.get("port") or "")) if isinstance(e, ConfigError) else ""
        print(FD_ROUTER.start_failure(PenstockError(fault) if fault else e), file=sys.stderr)
        return 1


def port_fault(port: str) -> str:
    """What Go says of a port when it comes to listening. Empty: it is one, or none was given."""
    if not port or (port.isascii() and port.isdigit() and 0 < int(port) <= 65535):
        return ""
    if port.removeprefix("-").isdigit():
        return f"listen tcp: address {port}: invalid port"
    return f"listen tcp: lookup tcp/{port}: unknown port"


if __name__ == "__main__":
    main()
