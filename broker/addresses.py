"""Addresses as people and engines write them, checked where they enter.

Each function gives the form in which the address is used. What is none is a `ValueError` with the rest of a sentence
that begins with the field's name.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from broker.errors import shown

_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*\.?")
_ENDPOINT = re.compile(
    r"tcp://(?P<host>\[[0-9A-Fa-f:.]+\]|\*|[A-Za-z0-9_.-]+):(?P<port>\d{1,5})|ipc://[\x21-\x7e]{1,100}"
)
_TARGET = re.compile(r"[/?][\x21-\x7e]*")
_WILDCARDS = ("0.0.0.0", "[::]", "*")


def origin(text: str, schemes: tuple[str, ...]) -> tuple[str, str]:
    """Scheme and host as they are within a URL: lower case, IPv6 in brackets. Without a scheme it has the first one."""
    scheme, separator, name = text.lower().partition("://")
    if not separator:
        scheme, name = schemes[0], scheme
    if scheme not in schemes:
        raise ValueError(f"has an unknown scheme: {shown(text)}")
    return scheme, _host(name.removesuffix("/"), text)


def endpoint(value: object) -> str:
    """A ZMQ endpoint that others can connect to."""
    match = _endpoint(value)
    if match["host"] in _WILDCARDS:
        raise ValueError(f"must be an address to connect to, not the wildcard {match['host']}")
    return match[0]


def bind(value: object) -> str:
    """A ZMQ endpoint to be bound."""
    return _endpoint(value)[0]


def service(text: str) -> tuple[str, str]:
    """An HTTP service: its origin, and its path with the query. The scheme may be missing, and is http then."""
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        is_private = parts.username is not None
        port = None if is_private else parts.port
    except ValueError as e:
        raise ValueError(f"must be a URL, not {shown(text)}: {e}") from e
    if is_private:  # and so not to be shown
        raise ValueError("must not have a user's name in it")
    scheme, host = origin(f"{parts.scheme}://{parts.hostname or ''}", ("http", "https"))
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    if path:
        target(path)
    return f"{scheme}://{host}" + (f":{port}" if port is not None else ""), path


def target(text: str) -> str:
    """What is appended to an instance's URL."""
    if not _TARGET.fullmatch(text):
        raise ValueError(f"must be a path like /health, not {shown(text)}")
    return text


def _host(name: str, text: str) -> str:
    wanted = "must be an IPv4 or IPv6 address or a host name"
    try:
        if ":" in name:
            address = ipaddress.IPv6Address(name.removeprefix("[").removesuffix("]"))
            if address.scope_id is not None:
                raise ValueError("must not have a scope id")
            return f"[{address.compressed}]"
        if name.rsplit(".", 1)[-1].isdigit():  # as browsers have it: what ends in a number is an IPv4 address
            return str(ipaddress.IPv4Address(name))
    except ipaddress.AddressValueError as e:
        raise ValueError(f"{wanted}, not {shown(text)}: {e}") from e
    if len(name) > 253 or not _HOST.fullmatch(name):
        raise ValueError(f"{wanted}, not {shown(text)}")
    return name


def _endpoint(value: object) -> re.Match[str]:
    match = _ENDPOINT.fullmatch(value) if isinstance(value, str) else None
    if not match or (match["port"] and not 1 <= int(match["port"]) <= 65535):
        raise ValueError(f"must be tcp://host:port or ipc://path, not {shown(value)}")
    return match
