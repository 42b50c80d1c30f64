"""What must be refused or dropped, sent to the real server over plain sockets: the answer, the count, the log's one
line per peer, and that serving goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Iterator

import msgpack
import pytest
import zmq

from tests.support.client import Client, chat
from tests.support.processes import Engine, Fleet, fetch
from tests.support.waiting import PATIENCE_S, until

CHAT = "/v1/chat/completions"
LIMIT = 4096
"""Of a body, as configured."""
LONGER = 1_000_000


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    settings = {"server": {"max-body-bytes": LIMIT}, "manager": {"expire-after-secs": 600}}
    with Fleet(tmp_path_factory.mktemp("bad"), workers=2, config=settings) as fleet:
        fleet.engine("http", "--transport", "http", "--model", "m", "--speed", "10")
        fleet.engine("zmq", "--transport", "zmq", "--model", "m", "--speed", "10")
        fleet.await_instances(2)
        yield fleet


def metric(fleet: Fleet, name: str) -> float:
    """The value of a metric without labels, or with those written in `name`."""
    _, text = fleet.get("/metrics")
    found: list[str] = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert len(found) == 1, (name, text)
    return float(found[0])


def asked(fleet: Fleet) -> int:
    """Requests that have reached an engine."""
    return sum(len(engine.ledger()["requests"]) for engine in fleet.engines.values())


def serves(fleet: Fleet) -> None:
    """Both engines, by way of any frontend, streamed and not."""

    async def ask() -> None:
        with Client(fleet.port) as client:
            for k in range(8):
                exchange = await client.ask(CHAT, chat(f"Hi {k}", stream=k % 2 == 0, model="m", max_tokens=2))
                assert exchange.whole, exchange

    asyncio.run(ask())


def exchange(fleet: Fleet, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """One request as raw bytes; status, headers and body of its answer."""
    with socket.create_connection(("127.0.0.1", fleet.port), timeout=PATIENCE_S) as connection:
        connection.sendall(data)
        received = b""
        while True:
            head, end, body = received.partition(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
            if end and len(body) >= int(headers.get("content-length", LONGER)):
                return int(lines[0].split()[1]), headers, body
            part = connection.recv(65536)
            assert part, f"the connection ended after {received!r}"
            received += part


def head(length: int | None = None, path: str = CHAT, extra: str = "") -> bytes:
    said = "" if length is None else f"Content-Length: {length}\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{said}{extra}\r\n".encode()


def posted(body: bytes) -> bytes:
    return head(len(body)) + body


def chunked(*parts: bytes) -> bytes:
    return head(extra="Transfer-Encoding: chunked\r\n") + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in parts)


MESSAGES = b'"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2'
REFUSED = {
    "empty": (posted(b""), 400, None),
    "no JSON": (posted(b"{,}"), 400, None),
    "no UTF-8": (posted(b'{"model": "\xff"}'), 400, None),
    "cut off": (posted(b'{"model": "m"'), 400, None),
    "nested without end": (posted(b"[" * (LIMIT - 10)), 400, None),
    "a list": (posted(b"[1]"), 400, None),
    "a string": (posted(b'"m"'), 400, None),
    "null": (posted(b"null"), 400, None),
    "model a number": (posted(b'{"model": 7, %b}' % MESSAGES), 400, "model"),
    "model a list": (posted(b'{"model": ["m"], %b}' % MESSAGES), 400, "model"),
    "stream a string": (posted(b'{"stream": "yes", %b}' % MESSAGES), 400, "stream"),
    "stream a number": (posted(b'{"stream": 1, %b}' % MESSAGES), 400, "stream"),
    "too large, as it says": (head(LIMIT + 1), 413, None),
    "too large, and sent": (posted(b" " * (LIMIT + 1)), 413, None),
    "too large, without a length": (chunked(b" " * LIMIT, b" "), 413, None),
    "unknown model": (posted(b'{"model": "other", %b}' % MESSAGES), 404, "model"),
}
FORWARDED = {
    "null counts as absent": posted(b'{"model": null, "stream": null, %b}' % MESSAGES),
    "as large as it may be": posted((b"{%b}" % MESSAGES).ljust(LIMIT)),
    "chunked": chunked(b"{%b}" % MESSAGES, b""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_body_is_refused_in_the_apis_form_and_nothing_is_forwarded(fleet: Fleet, name: str) -> None:
    data, status, param = REFUSED[name]
    counter = "penstock_model_not_found_requests_total" if status == 404 else "penstock_rejected_requests_total"
    before, counted = asked(fleet), metric(fleet, counter)
    got, headers, body = exchange(fleet, data)
    assert got == status, body
    assert headers["content-type"] == "application/json"
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    if param:
        assert (error["param"], param in error["message"]) == (param, True)
    assert asked(fleet) == before
    assert metric(fleet, counter) == counted + 1
    assert fleet.in_flight() == 0


@pytest.mark.parametrize("name", FORWARDED)
def test_what_is_just_allowed_is_forwarded(fleet: Fleet, name: str) -> None:
    before = asked(fleet)
    status, _, body = exchange(fleet, FORWARDED[name])
    assert status == 200, body
    assert json.loads(body)["choices"][0]["message"]["content"]
    assert asked(fleet) == before + 1


@pytest.mark.parametrize(
    "data", [b"\x00" * 64 + b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01" * 40], ids=["zeros", "half", "TLS"]
)
def test_what_is_no_http_costs_its_connection_only(fleet: Fleet, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", fleet.port), timeout=PATIENCE_S) as connection:
        connection.sendall(data)
        answer = connection.recv(65536)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    serves(fleet)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"role": "other", "host_ip": "127.0.0.1", "port": 1}, "role"),
        ({"role": "mixed", "host_ip": "127.0.0.1", "port": "x"}, "port"),
        ({"role": "mixed", "host_ip": "127.0.0.1", "port": 1, "engine": "unheard"}, "engine"),
        ({"role": "mixed", "host_ip": 7, "port": 1}, "host_ip"),
        ({"role": "mixed", "host_ip": "127.0.0.1", "port": 1, "capacity": -1}, "capacity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_registration_with_a_bad_field_names_it(fleet: Fleet, body: dict[str, object], field: str) -> None:
    status, answer = fleet.post("/register", body)
    assert status == 400
    assert field in json.dumps(answer)
    assert len(fleet.instances()) == 2


def test_with_no_instance_the_client_is_told_to_come_again(fleet: Fleet) -> None:
    """All drained: 503 with Retry-After, and 200 again once one is back."""
    urls = [instance["url"] for instance in fleet.instances()]
    counter = "penstock_no_instance_requests_total"
    counted = metric(fleet, counter)
    for url in urls:
        assert fleet.post("/drain", {"url": url})[0] == 200
    until(lambda: {i["state"] for i in fleet.instances()} == {"draining"}, "drained")
    status, headers, body = exchange(fleet, posted(b"{%b}" % MESSAGES))
    assert (status, int(headers["retry-after"]) >= 1) == (503, True)
    assert json.loads(body)["error"]["message"]
    assert metric(fleet, counter) == counted + 1
    assert fleet.get("/ready")[0] == 503
    for url in urls:
        assert fleet.post("/drain", {"url": url, "resume": True})[0] == 200
    fleet.await_instances(2)
    serves(fleet)


# -- frames ------------------------------------------------------------------------------------------------

BAD_FRAMES: dict[str, list[bytes]] = {
    "empty": [b""],
    "no msgpack": [b"\xc1 nothing"],
    "a map": [msgpack.packb({"a": 1})],
    "an unknown tag": [msgpack.packb([99, 1])],
    "too few fields": [msgpack.packb([2])],
    "wrong types": [msgpack.packb([1, "a", "b", "c"])],
    "two frames": [msgpack.packb([1, 1, 1, 1]), b"more"],
    "oversized": [msgpack.packb([2, 1, b"x" * 100_000])],
    "foreign": [b"GET / HTTP/1.1\r\n\r\n"],
}
SOCKETS = {"control.sock": zmq.DEALER, "engines.sock": zmq.DEALER, "load.sock": zmq.PUB}
DROPPED = 'penstock_scheduler_events_total{event="frames_dropped"}'
UNKNOWN = 'penstock_scheduler_events_total{event="loads_dropped"}'


@pytest.mark.parametrize("name", SOCKETS)
def test_bad_frames_to_the_scheduler_are_counted_logged_once_per_peer_and_dropped(fleet: Fleet, name: str) -> None:
    pid = fleet.process("scheduler").pid
    before, said = metric(fleet, DROPPED), fleet.supervisor.output.count("said once per peer")
    unknown = metric(fleet, UNKNOWN)
    # The scheduler subscribes to one topic; what has another never leaves the publisher.
    topic = [b"load"] if name == "load.sock" else []
    # On control.sock a registration of that size is read, and refused in words; on load.sock it ends the connection.
    wanted = [[*topic, *frames] for kind, frames in BAD_FRAMES.items() if kind != "oversized" or name == "engines.sock"]
    with zmq.Context() as context, context.socket(SOCKETS[name]) as peer:
        peer.linger = 0
        peer.connect(f"ipc://{fleet.run_dir}/{name}")
        if topic:
            # A PUB drops until its subscriber has spoken.
            until(lambda: _published(peer, fleet, unknown), "the subscription")
        for _ in range(2):
            for frame in wanted:
                peer.send_multipart(frame)
        until(lambda: metric(fleet, DROPPED) >= before + 2 * len(wanted), lambda: metric(fleet, DROPPED))
        assert metric(fleet, DROPPED) == before + 2 * len(wanted)
    assert fleet.supervisor.output.count("said once per peer") == said + 1
    assert fleet.process("scheduler").pid == pid
    assert len(fleet.await_instances(2)) == 2
    serves(fleet)


def _published(peer: zmq.Socket[bytes], fleet: Fleet, before: float) -> bool:
    """The load of nobody who is registered has a count of its own."""
    peer.send_multipart([b"load", bytes(8), msgpack.packb(["Load", b"nobody's, unknow", 0, 0])])
    return metric(fleet, UNKNOWN) > before


def test_a_frame_beyond_every_limit_ends_its_connection_only(fleet: Fleet) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        with peer.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
            peer.connect(f"ipc://{fleet.run_dir}/control.sock")
            peer.send(b"x" * (8 * 1024 * 1024))
            assert monitor.poll(60_000), "the scheduler took it"
            peer.disable_monitor()
    assert len(fleet.await_instances(2)) == 2
    serves(fleet)


def test_a_foreign_protocol_on_the_unix_sockets_disturbs_nobody(fleet: Fleet) -> None:
    with contextlib.ExitStack() as stack:
        for name in [*SOCKETS] * 5:
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.connect(str(fleet.run_dir / name))
            peer.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10)
        serves(fleet)
        assert len(fleet.await_instances(2)) == 2
    serves(fleet)


@pytest.mark.parametrize("fault", ["frame", "gap"])
def test_an_engines_bad_frames_end_its_requests_and_nothing_else(fleet: Fleet, fault: str) -> None:
    """`frame`: garbage before the answer, dropped, the answer is whole. `gap`: a part is missing, never silently."""
    engine = fleet.engines["zmq"]
    said = fleet.supervisor.output.count("said once)")
    engine.fault(malformed=fault)
    try:

        async def ask() -> None:
            with Client(fleet.port) as client:
                exchanges = [await client.ask(CHAT, chat(f"{k}", model="m", max_tokens=9)) for k in range(12)]
            of_engine = [e for e in exchanges if e.fingerprint() == "zmq"]
            assert of_engine, exchanges
            for e in exchanges:
                assert e.whole == (fault == "frame" or e not in of_engine), e
                assert e.whole or e.error() is not None, e

        asyncio.run(ask())
    finally:
        engine.fault(malformed="")
    if fault == "frame":
        # Once per connection, and there is one from each frontend.
        assert said < fleet.supervisor.output.count("said once)") <= said + 2
    serves(fleet)
    fleet.await_idle()


def test_a_stranger_at_an_engines_data_socket_harms_nobody(fleet: Fleet) -> None:
    engine: Engine = fleet.engines["zmq"]
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.linger = 0
        peer.connect(engine.url)
        for frames in BAD_FRAMES.values():
            peer.send_multipart(frames)
        serves(fleet)
    assert fetch(engine.said["admin"] + "/health")[0] == 200
    serves(fleet)
