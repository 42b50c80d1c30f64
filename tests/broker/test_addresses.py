"""Addresses from settings and registrations: the form in which they are used, or a sentence."""

from __future__ import annotations

import pytest

from broker import addresses


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("10.0.0.1", ("http", "10.0.0.1")),
        ("HTTPS://Node-1.Example/", ("https", "node-1.example")),
        ("::1", ("http", "[::1]")),
        ("http://[2001:DB8:0::1]", ("http", "[2001:db8::1]")),
    ],
)
def test_an_origin_is_as_it_is_within_a_url(written: str, meant: tuple[str, str]) -> None:
    assert addresses.origin(written, ("http", "https")) == meant


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("tcp://a", "has an unknown scheme"),
        ("", "must be an IPv4 or IPv6 address or a host name"),
        ("1.2.3", "must be an IPv4"),
        ("fe80::1%eth0", "must not have a scope id"),
        ("a b", "must be an IPv4"),
        ("a/b", "must be an IPv4"),
    ],
)
def test_what_is_no_origin_is_said(written: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        addresses.origin(written, ("http", "https"))


@pytest.mark.parametrize("text", ["tcp://10.0.0.1:1", "tcp://[::1]:65535", "tcp://node-1.x:30100", "ipc:///run/x.sock"])
def test_an_endpoint_can_be_bound_and_connected_to(text: str) -> None:
    assert addresses.bind(text) == addresses.endpoint(text) == text


@pytest.mark.parametrize("text", ["tcp://0.0.0.0:1", "tcp://*:1", "tcp://[::]:1"])
def test_a_wildcard_can_only_be_bound(text: str) -> None:
    assert addresses.bind(text) == text
    with pytest.raises(ValueError, match="not the wildcard"):
        addresses.endpoint(text)


@pytest.mark.parametrize(
    "value", ["", "10.0.0.1:1", "tcp://a", "tcp://a:0", "tcp://a:65536", "tcp://a:*", "tcp://a b:1", "ipc://", None, 5]
)
def test_what_is_no_endpoint_is_said(value: object) -> None:
    with pytest.raises(ValueError, match="must be tcp://host:port or ipc://path, not "):
        addresses.bind(value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("tok:80", ("http://tok:80", "")),
        ("https://Tok/", ("https://tok", "/")),
        ("http://[::1]:8098/a/b?c=d", ("http://[::1]:8098", "/a/b?c=d")),
        ("tok?x=1", ("http://tok", "?x=1")),
    ],
)
def test_a_service_has_an_origin_and_a_path(written: str, meant: tuple[str, str]) -> None:
    assert addresses.service(written) == meant


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("http://", "must be an IPv4 or IPv6 address or a host name"),
        ("http://a:99999", "must be a URL"),
        ("http://[::1", "must be a URL"),
        ("ftp://a", "has an unknown scheme"),
        ("http://me:secret@a:b", "must not have a user's name in it"),
        ("http://a/b c", "must be a path"),
        ("http://a/\u00e4", "must be a path"),
    ],
)
def test_what_is_no_service_is_said(written: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        addresses.service(written)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("text", ["/health", "/v1/health?deep=1", "?probe"])
def test_a_target_may_follow_a_port(text: str) -> None:
    assert addresses.target(text) == text


@pytest.mark.parametrize("text", ["health", ":80/health", "/a b", "/\r\nx: y"])
def test_what_may_not_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="must be a path like /health"):
        addresses.target(text)
