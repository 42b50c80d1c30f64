"""Where a Penstock's scheduler listens, and where this engine should."""

from __future__ import annotations

import http.client
import os
import socket
from urllib.parse import urlsplit

import msgspec

from broker import wire


class EndpointsError(Exception):
    """Penstock is away, or what answers is none, or none of its endpoints can be reached from here."""


class Endpoints(msgspec.Struct, frozen=True):
    """The answer to `GET /endpoints`; both lists may hold several ways to the same socket."""

    protocol: int
    run: str
    control: list[str]
    load: list[str]


class Way(msgspec.Struct, frozen=True):
    """The endpoints chosen out of an answer."""

    control: str
    load: str


def fetch(router: str, timeout_s: float = 2.0) -> Endpoints:
    """Asks Penstock; blocking. Raises `EndpointsError`."""
    host, port = host_and_port(router)
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request("GET", "/endpoints")
        response = connection.getresponse()
        body = response.read(wire.MAX_CONTROL_BYTES)
    except (OSError, http.client.HTTPException) as e:
        raise EndpointsError(f"no answer from {router}: {e or type(e).__name__}") from e
    finally:
        connection.close()
    if response.status != 200:
        raise EndpointsError(f"{router}/endpoints answered {response.status}")
    try:
        endpoints = msgspec.json.decode(body, type=Endpoints)
    except msgspec.DecodeError as e:
        raise EndpointsError(f"{router}/endpoints is not Penstock's: {e}") from e
    if endpoints.protocol != wire.PROTOCOL:
        raise EndpointsError(f"{router} speaks protocol {endpoints.protocol}, this engine {wire.PROTOCOL}")
    return endpoints


def choose(endpoints: Endpoints, router: str) -> Way:
    """The best way from here: a unix socket whose path exists, else TCP with the router's own host for a wildcard."""
    host, _ = host_and_port(router)
    return Way(_best(endpoints.control, host, "control"), _best(endpoints.load, host, "load"))


def _best(offered: list[str], host: str, what: str) -> str:
    for endpoint in offered:
        if endpoint.startswith("ipc://") and os.path.exists(endpoint.removeprefix("ipc://")):
            return endpoint
    for endpoint in offered:
        if endpoint.startswith("tcp://"):
            return with_host(endpoint, host)
    raise EndpointsError(f"none of the {what} endpoints {offered} can be reached from here")


def default_bind(router: str, incarnation: bytes) -> str:
    """On Penstock's own machine a Linux abstract socket (unique, and no file to leave behind); else TCP on the
    address that leads to Penstock. Containers that share a machine but no network namespace must say `bind`."""
    host, _ = host_and_port(router)
    here, there = local_address(host), _resolve(host)[1]
    if there in (here, "::1") or there.startswith("127."):
        return f"ipc://@penstock-{incarnation.hex()}"
    return with_host("tcp://*:*", here)


def advertised(bound: str, router: str) -> str:
    """The endpoint as a frontend must connect to it: a wildcard becomes the address that leads to Penstock."""
    return with_host(bound, local_address(host_and_port(router)[0]))


def with_host(endpoint: str, host: str) -> str:
    scheme, _, address = endpoint.partition("://")
    name, _, port = address.rpartition(":")
    if scheme == "tcp" and name in ("*", "0.0.0.0", "[::]"):
        return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
    return endpoint


def local_address(host: str) -> str:
    """Our own address on the way to `host`; no packet is sent."""
    family, address = _resolve(host)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _resolve(host: str) -> tuple[int, str]:
    """Address family and address; the name itself when it has none (now)."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)[0]
    except OSError:
        return socket.AF_INET, host
    return family, str(address[0])


def host_and_port(router: str) -> tuple[str, int]:
    """Of `http://host:port`, or `host:port` as FastDeploy's `--router` has it. Raises ValueError."""
    parts = urlsplit(router if "://" in router else f"http://{router}")
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"the router must be http://host:port, not {router!r}")
    return parts.hostname, parts.port or 80
