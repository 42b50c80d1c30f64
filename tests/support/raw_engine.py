"""A native engine written from docs/wire.md alone, with plain pyzmq and msgpack: no import of Penstock.

    python tests/support/raw_engine.py http://127.0.0.1:30000 [--model NAME]

It registers with nested binary transfer metadata of about 6 KiB and answers every request with what it was asked:
path, a hash of the body, and a hash of the transfer bytes that came with it. One word of the answer per step.
Prints its incarnation as hex when it is registered; SIGTERM ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import time
import urllib.request
from typing import Any

import msgpack
import zmq

BEAT_S = 0.5
DEAD_AFTER_S = 2.5


def transfer_metadata() -> bytes:
    """What an RDMA and NCCL engine might register: nested, binary, about 6 KiB, the same at every call."""
    noise = hashlib.shake_256(b"transfer").digest(5 * 1024)
    return msgpack.packb(
        {
            "nccl": {
                "unique_id": noise[:128],
                "ranks": [{"rank": r, "address": ["10.0.0.1", 7000 + r]} for r in range(8)],
            },
            "rdma": [{"gid": noise[i : i + 16], "port": 7100 + i, "key": 2**63 + i} for i in range(0, 512, 16)],
            "devices": list(range(8)),
            "blob": noise[512:],
            "nothing": None,
        }
    )


def words_of(path: str, body: bytes, transfer: bytes) -> list[str]:
    """The words of an answer; a test computes them too."""
    return ["raw", path, hashlib.sha256(body).hexdigest(), hashlib.sha256(transfer).hexdigest()]


class RawEngine:
    """One life: `turn` until `stopping` and idle."""

    def __init__(self, router: str, models: list[str]) -> None:
        self.incarnation = b"\x01" + os.urandom(15)
        self.stopping = False
        self.registered = False
        self._models = models
        self._epoch = -1
        self._next_beat = 0.0
        self._next_load = 0.0
        self._load_sequence = 0
        self._heard: dict[bytes, float] = {}
        self._open: dict[tuple[bytes, int], list[bytes]] = {}
        """What is still to be sent of each request, one piece per step."""
        self._sent: dict[tuple[bytes, int], int] = {}

        context = zmq.Context()
        self._data = context.socket(zmq.ROUTER)
        self._data.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._data.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.endpoint = f"ipc://@raw-{self.incarnation.hex()}"
        self._data.bind(self.endpoint)
        ways = self._ask(router)
        self._control = context.socket(zmq.DEALER)
        self._control.setsockopt(zmq.ROUTING_ID, self.incarnation)
        self._control.setsockopt(zmq.IMMEDIATE, 1)
        self._control.connect(_reachable(ways["control"]))
        self._load = context.socket(zmq.PUB)
        self._load.connect(_reachable(ways["load"]))
        self._poller = zmq.Poller()
        self._poller.register(self._data, zmq.POLLIN)
        self._poller.register(self._control, zmq.POLLIN)

    def _ask(self, router: str) -> dict[str, Any]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{router}/endpoints", timeout=60) as answer:
            ways: dict[str, Any] = json.load(answer)
        assert ways["protocol"] == 1
        return ways

    def turn(self) -> None:
        for socket, _ in self._poller.poll(10):
            while socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                frames = socket.recv_multipart()
                if socket is self._control:
                    self._from_scheduler(msgpack.unpackb(frames[0]))
                else:
                    self._from_frontend(*frames)
        now = time.monotonic()
        if now >= self._next_beat and not self.stopping:
            self._next_beat = now + BEAT_S
            if self.registered:
                self._say(33, self.incarnation, 4, True)
            else:
                self._say(32, 1, self.incarnation, self.endpoint, 0, self._models, 4, transfer_metadata())
        if now >= self._next_load:
            self._next_load = now + 1.0
            load = ["Load", self.incarnation, len(self._open), 0]
            self._load.send_multipart([b"load", self._load_sequence.to_bytes(8, "big"), msgpack.packb(load)])
            self._load_sequence += 1
        for peer in [p for p, heard in self._heard.items() if now - heard > DEAD_AFTER_S]:
            self._forget(peer)
        self._step()

    def goodbye(self) -> None:
        self.stopping = True
        self._say(34, self.incarnation)

    @property
    def idle(self) -> bool:
        return not self._open

    def _say(self, *message: object) -> None:
        with contextlib.suppress(zmq.Again):
            self._control.send(msgpack.packb(list(message)), zmq.NOBLOCK)

    def _from_scheduler(self, message: list[Any]) -> None:
        match message:
            case [48, _, epoch, *_]:
                self.registered, self._epoch = True, epoch
            case [50, epoch, *_] if epoch != self._epoch:
                self.registered = False
            case [51, *_]:
                self.registered = False

    def _from_frontend(self, peer: bytes, frame: bytes, body: bytes = b"") -> None:
        self._heard[peer] = time.monotonic()
        match msgpack.unpackb(frame):
            case [64, _, _, *_]:
                self._send(peer, 80, 1, self.incarnation)
            case [65, *_]:
                self._send(peer, 81, self.incarnation)
            case [66, incarnation, number, path, stream, _, *rest]:
                if incarnation != self.incarnation:
                    self._send(peer, 82, self.incarnation, [[number, 0, 2, b'{"error":{"message":"gone"}}', 409]])
                    return
                transfer = rest[0] if rest else b""
                self._open[peer, number] = _pieces(words_of(path, body, transfer), stream)
                self._sent[peer, number] = 0
            case [67, numbers, *_]:
                for number in numbers:
                    self._open.pop((peer, number), None)
                    self._sent.pop((peer, number), None)

    def _step(self) -> None:
        """One piece of every open request, in one message per frontend."""
        deltas: dict[bytes, list[list[Any]]] = {}
        for (peer, number), pieces in list(self._open.items()):
            piece = pieces.pop(0)
            sequence = self._sent[peer, number]
            self._sent[peer, number] += 1
            deltas.setdefault(peer, []).append([number, sequence, 0 if pieces else 1, piece])
            if not pieces:
                del self._open[peer, number], self._sent[peer, number]
        for peer, step in deltas.items():
            self._send(peer, 82, self.incarnation, step)

    def _send(self, peer: bytes, *message: object) -> None:
        try:
            self._data.send_multipart([peer, msgpack.packb(list(message))])
        except zmq.ZMQError as e:
            if e.errno != zmq.EHOSTUNREACH:
                raise
            self._forget(peer)

    def _forget(self, peer: bytes) -> None:
        self._heard.pop(peer, None)
        for key in [k for k in self._open if k[0] == peer]:
            del self._open[key], self._sent[key]


def _pieces(words: list[str], stream: bool) -> list[bytes]:
    if not stream:
        return [json.dumps({"object": "text_completion", "choices": [{"index": 0, "text": " ".join(words)}]}).encode()]
    choices = [{"choices": [{"index": 0, "text": w if not i else f" {w}"}]} for i, w in enumerate(words)]
    return [*(f"data: {json.dumps(c)}\n\n".encode() for c in choices), b"data: [DONE]\n\n"]


def _reachable(ways: list[str]) -> str:
    for way in ways:
        if way.startswith("tcp://") or os.path.exists(way.removeprefix("ipc://")):
            return way
    raise SystemExit(f"none of {ways} can be reached")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("router")
    parser.add_argument("--model", action="append", default=[])
    options = parser.parse_args()
    engine = RawEngine(options.router, options.model)
    signal.signal(signal.SIGTERM, lambda *_: engine.goodbye())
    said = False
    while not (engine.stopping and engine.idle):
        engine.turn()
        if engine.registered and not said:
            said = True
            print(engine.incarnation.hex(), flush=True)


if __name__ == "__main__":
    main()
