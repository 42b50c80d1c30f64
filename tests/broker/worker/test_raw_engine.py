"""An engine written from docs/wire.md alone, and the examples of that page against our own codec."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker import wire
from broker.types import Role
from tests.support import raw_engine, raw_native
from tests.support.processes import Fleet
from tests.support.raw_engine import transfer_metadata, words_of
from tests.support.raw_native import RawFrontend, RawPenstock
from tests.support.waiting import PATIENCE_S

ROOT = Path(__file__).parents[3]
INCARNATION = bytes(range(0x10, 0x20))


@pytest.fixture
def process(penstock: RawPenstock) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, raw_engine.__file__, penstock.url, "--model", "m"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_opaque_transfer_metadata_arrives_byte_equal(penstock: RawPenstock, process: subprocess.Popen[str]) -> None:
    hello = penstock.accept()
    assert len(transfer_metadata()) > 6 * 1024
    assert hello[7] == transfer_metadata()


def test_its_hello_and_beats_are_what_our_scheduler_reads(
    penstock: RawPenstock, process: subprocess.Popen[str]
) -> None:
    hello = penstock.accept()
    read = wire.decode(wire.from_engine, raw_native.msgpack.packb(hello))
    assert isinstance(read, wire.EngineHello)
    assert (read.role, read.models, read.capacity, read.transfer) == (Role.MIXED, ["m"], 4, transfer_metadata())
    _, beat = penstock.hear(raw_native.ENGINE_BEAT)
    assert wire.decode(wire.from_engine, raw_native.msgpack.packb(beat)) == wire.EngineBeat(read.incarnation, 4, True)


def test_it_answers_with_what_it_was_asked(penstock: RawPenstock, process: subprocess.Popen[str]) -> None:
    hello = penstock.accept()
    body = b'{"prompt": "x", "n": 12345678901234567890}'
    expected = " ".join(words_of("/v1/completions", body, b"peer"))
    with RawFrontend(hello[3], hello[2]) as frontend:
        frontend.hello()
        frontend.request(1, body, stream=False, transfer=b"peer")
        frontend.request(2, body, stream=True, transfer=b"peer")
        answers = frontend.answers(1, 2)
    assert json.loads(answers[1][1])["choices"][0]["text"] == expected
    *events, end = answers[2][1].decode().removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    assert "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events) == expected


def test_it_says_goodbye_and_ends(penstock: RawPenstock, process: subprocess.Popen[str]) -> None:
    penstock.accept()
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    penstock.hear(raw_native.ENGINE_GOODBYE)
    assert process.wait(PATIENCE_S) == 0


EXAMPLES: dict[str, object] = {
    "EngineHello": wire.EngineHello(1, INCARNATION, "ipc://@e", Role.MIXED, ["m"], 8, b"\x01\x02", "e1"),
    "EngineBeat": wire.EngineBeat(INCARNATION, 8, True),
    "EngineGoodbye": wire.EngineGoodbye(INCARNATION),
    "Accepted": wire.Accepted(1, 7),
    "Refused": wire.Refused("full"),
    "SchedulerBeat": wire.SchedulerBeat(7),
    "HelloAgain": wire.HelloAgain(),
    "DataHello": wire.DataHello(1, 7),
    "DataWelcome": wire.DataWelcome(1, INCARNATION),
    "Ping": wire.Ping(),
    "Pong": wire.Pong(INCARNATION),
    "Request": wire.Request(INCARNATION, 5, "/v1/completions", True, {"x-request-id": "r"}, b""),
    "Abort": wire.Abort([5, 6]),
    "Step": [82, INCARNATION, [[5, 0, 0, b"Hi"], [6, 3, 1, b""], [9, 0, 2, b"{}", 429]]],
    "load": wire.Load(INCARNATION, 3, 1, 420, 55),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_bytes_of_the_document_are_what_our_codec_writes(name: str) -> None:
    document = (ROOT / "docs" / "wire.md").read_text()
    (example,) = re.findall(
        rf"^{name} +((?:[0-9a-f]{{2}}|<inc>)(?:.*\n(?: {{20,}}9[45].*\n)*))", document, re.MULTILINE
    )
    text = re.sub(r" {2,}(\"|\[).*", "", example).replace("<inc>", "c410" + INCARNATION.hex())
    written = bytes.fromhex(re.sub(r"[^0-9a-f]", "", text))
    if name == "load":
        written = written.removeprefix((2).to_bytes(8, "big"))
    assert written == wire.encode(EXAMPLES[name])


@pytest.mark.parametrize(
    ("row", "value"),
    [
        ("| beats |", f"every {wire.BEAT_S} s; dead after {wire.DEAD_AFTER_S} s"),
        ("| `transfer` |", f"{wire.MAX_TRANSFER_BYTES:,} bytes"),
        ("| any control message", f"{wire.MAX_CONTROL_BYTES // 1024} KiB"),
    ],
)
def test_the_limits_of_the_document_are_those_in_force(row: str, value: str) -> None:
    (line,) = [x for x in (ROOT / "docs" / "wire.md").read_text().splitlines() if x.startswith(row)]
    assert value in line


def test_a_real_penstock_carries_the_metadata_and_the_answer_of_such_an_engine() -> None:
    body = b'{"model": "raw", "prompt": "x", "n": 12345678901234567890}'
    with tempfile.TemporaryDirectory(prefix="raw-") as root, Fleet(Path(root), workers=1) as fleet:
        engine = fleet.program("raw", [raw_engine.__file__, fleet.url, "--model", "raw"])
        (instance,) = fleet.await_instances(1)
        status, answer = fleet.post("/v1/completions", body)
        engine.signal(signal.SIGTERM)
        assert engine.await_exit() == 0
    assert base64.b64decode(instance["transfer"]["base64"]) == transfer_metadata()
    assert status == 200
    assert answer["choices"][0]["text"] == " ".join(words_of("/v1/completions", body, b""))
