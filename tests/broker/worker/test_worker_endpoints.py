"""Which way an engine takes to Penstock, and which it offers to the frontends."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.worker import endpoints
from broker.worker.endpoints import (
    Endpoints,
    EndpointsError,
    advertised,
    choose,
    default_bind,
    fetch,
    host_and_port,
    with_host,
)
from tests.support.raw_native import RawPenstock

ROUTER = "http://127.0.0.1:30000"


def offered(*ways: str) -> Endpoints:
    return Endpoints(protocol=1, run="r", control=list(ways), load=list(ways))


def test_a_unix_socket_that_exists_here_is_preferred(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.touch()
    way = choose(offered("tcp://10.0.0.1:5", f"ipc://{path}"), ROUTER)
    assert (way.control, way.load) == (f"ipc://{path}", f"ipc://{path}")


def test_tcp_is_taken_where_the_unix_socket_is_not_and_its_wildcard_is_the_router(tmp_path: Path) -> None:
    way = choose(offered(f"ipc://{tmp_path}/none", "tcp://0.0.0.0:5"), "http://penstock.example:30000")
    assert way.control == "tcp://penstock.example:5"


def test_no_way_is_an_error_that_shows_what_was_offered(tmp_path: Path) -> None:
    with pytest.raises(EndpointsError, match="none of the control endpoints"):
        choose(offered(f"ipc://{tmp_path}/none"), ROUTER)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost"])
def test_on_the_routers_machine_the_default_is_an_abstract_socket_of_this_life(host: str) -> None:
    assert default_bind(f"http://{host}:30000", b"\x10" * 16) == "ipc://@penstock-" + "10" * 16


def test_elsewhere_the_default_is_a_free_port_on_the_address_that_leads_to_the_router(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoints, "local_address", lambda host: "10.0.0.9")
    assert default_bind("http://10.0.0.5:30000", b"\x10" * 16) == "tcp://10.0.0.9:*"
    monkeypatch.setattr(endpoints, "local_address", lambda host: "fd00::9")
    assert default_bind("http://[fd00::5]:30000", b"\x10" * 16) == "tcp://[fd00::9]:*"


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("tcp://0.0.0.0:5", "tcp://h:5"),
        ("tcp://*:5", "tcp://h:5"),
        ("tcp://10.0.0.1:5", "tcp://10.0.0.1:5"),
        ("ipc://@x", "ipc://@x"),
    ],
)
def test_only_a_wildcard_host_is_replaced(endpoint: str, expected: str) -> None:
    assert with_host(endpoint, "h") == expected


def test_what_is_advertised_has_no_wildcard() -> None:
    assert advertised("tcp://0.0.0.0:5", ROUTER) == "tcp://127.0.0.1:5"


@pytest.mark.parametrize("router", ["http://h:1", "h:1", "http://h:1/"])
def test_a_router_may_be_written_as_fastdeploy_does(router: str) -> None:
    assert host_and_port(router) == ("h", 1)


def test_another_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="http://host:port"):
        host_and_port("ftp://h:1")


def test_endpoints_are_fetched_and_a_penstock_that_is_away_is_an_error() -> None:
    with RawPenstock() as penstock:
        assert fetch(penstock.url).run == penstock.run
        url = penstock.url
    with pytest.raises(EndpointsError, match="no answer"):
        fetch(url)
