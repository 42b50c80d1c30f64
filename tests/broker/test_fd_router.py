"""The command line of FastDeploy's router: Go's rules for flags."""

from __future__ import annotations

import pytest

from broker.fd_router import Usage, parse, port_fault, version


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("", {}),
        ("--port 30000", {"port": "30000"}),
        ("-port=30000", {"port": "30000"}),
        ("--port=", {"port": ""}),
        ("-port -splitwise", {"port": "-splitwise"}),  # a flag that wants a value takes the next word, whatever it is
        ("-splitwise", {"splitwise": True}),
        ("--splitwise=true -port 1", {"splitwise": True, "port": "1"}),
        ("--splitwise=F", {"splitwise": False}),
        ("-splitwise -splitwise=0", {"splitwise": False}),
        ("-splitwise true -port 1", {"splitwise": True}),  # "true" is no flag, and ends them
        ("-port 1 -- -splitwise", {"port": "1"}),
        ("-port 1 - -splitwise", {"port": "1"}),
        ("word -port 1", {}),
        ("-config_path a=b.yaml", {"config_path": "a=b.yaml"}),
        ("--config_path=a=b.yaml", {"config_path": "a=b.yaml"}),
        ("-V", {"V": True}),
        ("--version", {"version": True}),
        ("-port 1 -port 2", {"port": "2"}),
    ],
)
def test_flags(line: str, flags: dict[str, object]) -> None:
    assert parse(line.split()) == flags


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-nope", "flag provided but not defined: -nope"),
        ("--nope=1", "flag provided but not defined: -nope"),
        ("--Port 1", "flag provided but not defined: -Port"),
        ("--port", "flag needs an argument: -port"),
        ("---port 1", "bad flag syntax: ---port"),
        ("-=1", "bad flag syntax: -=1"),
        ("--=1", "bad flag syntax: --=1"),
        ("-splitwise=yes", 'invalid boolean value "yes" for -splitwise: parse error'),
        ("-splitwise=", 'invalid boolean value "" for -splitwise: parse error'),
        ("-h", ""),
        ("--help", ""),
        ("-port 1 -help", ""),
    ],
)
def test_what_cannot_be_used_is_said_as_go_says_it(line: str, said: str) -> None:
    with pytest.raises(Usage) as found:
        parse(line.split())
    assert str(found.value) == said


@pytest.mark.parametrize(
    ("port", "said"),
    [
        ("", ""),
        ("1", ""),
        ("65535", ""),
        ("65536", "listen tcp: address 65536: invalid port"),
        ("-1", "listen tcp: address -1: invalid port"),
        ("http", "listen tcp: lookup tcp/http: unknown port"),
    ],
)
def test_a_port_that_is_none(port: str, said: str) -> None:
    assert port_fault(port) == said


def test_the_version_has_the_originals_lines() -> None:
    first, *rest = version().splitlines()
    assert first == "golang-router"
    assert [line[:2] for line in rest] == ["  "] * 5
    assert [line.strip().split(":")[0] for line in rest] == ["version", "commit", "dirty", "vcsTime", "module"]
