"""Reading and writing what passes through: chat bodies, wire messages, a step of 128 deltas, and splicing.

What a frontend does with a body: find the few fields that routing needs (`peek`), and at most replace one member
(`splice`); never decode and encode the whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgpack
import msgspec
import orjson
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from broker import wire
from broker.splice import replace_member

PROSE = "The quick brown fox jumps over the lazy dog.\n"
SIZES = {"1 KiB": 1024, "32 KiB": 32 * 1024}


def chat(size: int) -> bytes:
    """One long message, a few parameters."""
    body: dict[str, Any] = {
        "model": "qwen",
        "messages": [{"role": "system", "content": "You are a helpful assistant."}],
        "stream": True,
        "temperature": 0.7,
        "max_tokens": 256,
        "stream_options": {"include_usage": True},
    }
    room = size - len(orjson.dumps(body)) - 40
    body["messages"].append({"role": "user", "content": (PROSE * (room // len(PROSE) + 1))[: room - room // 50]})
    return orjson.dumps(body)


def agent(size: int) -> bytes:
    """Many small values: tool definitions, as agents send them with every turn."""
    schema = {"type": "object", "properties": {"path": {"type": "string"}, "line": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "open_file", "description": PROSE, "parameters": schema}}
    body = {"model": "qwen", "messages": [{"role": "user", "content": PROSE}], "stream": True}
    return orjson.dumps({**body, "tools": [tool] * ((size - 200) // len(orjson.dumps(tool)))})


class Peek(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None


peek = msgspec.json.Decoder(Peek).decode


def splice(body: bytes) -> bytes:
    return replace_member(body, "disaggregate_info", b'{"room":1}')


def through(loads: Callable[[bytes], Any], dumps: Callable[[Any], bytes | str]) -> Callable[[bytes], object]:
    """Add a member by decoding and encoding the whole."""

    def add(body: bytes) -> object:
        value = loads(body)
        value["disaggregate_info"] = {"room": 1}
        return dumps(value)

    return add


READ: dict[str, Callable[[bytes], object]] = {
    "orjson": orjson.loads,
    "msgspec": msgspec.json.Decoder().decode,
    "msgspec, two fields": peek,
    "json": json.loads,
}
ADD: dict[str, Callable[[bytes], object]] = {
    "splice": splice,
    "orjson": through(orjson.loads, orjson.dumps),
    "msgspec": through(msgspec.json.Decoder().decode, msgspec.json.Encoder().encode),
    "json": through(json.loads, json.dumps),
}
bodies = pytest.mark.parametrize("body", [chat, agent], ids=["chat", "agent"])
sizes = pytest.mark.parametrize("size", SIZES)


@sizes
@bodies
@pytest.mark.parametrize("codec", READ)
def test_read_a_body(benchmark: BenchmarkFixture, size: str, body: Callable[[int], bytes], codec: str) -> None:
    benchmark.group = f"read a body: {body.__name__}, {size}"
    benchmark(READ[codec], body(SIZES[size]))


@sizes
@bodies
@pytest.mark.parametrize("codec", ADD)
def test_add_a_member(benchmark: BenchmarkFixture, size: str, body: Callable[[int], bytes], codec: str) -> None:
    benchmark.group = f"add a member: {body.__name__}, {size}"
    benchmark(ADD[codec], body(SIZES[size]))


@sizes
@pytest.mark.parametrize("codec", ["orjson", "msgspec json", "msgspec msgpack", "msgpack"])
def test_write_a_body(benchmark: BenchmarkFixture, size: str, codec: str) -> None:
    benchmark.group = f"write a body: {size}"
    write: dict[str, Callable[[Any], bytes]] = {
        "orjson": orjson.dumps,
        "msgspec json": msgspec.json.Encoder().encode,
        "msgspec msgpack": msgspec.msgpack.Encoder().encode,
        "msgpack": msgpack.packb,
    }
    benchmark(write[codec], orjson.loads(chat(SIZES[size])))


# -- the wire ----------------------------------------------------------------------------------------------

INCARNATION = bytes(range(16))
REQUEST = wire.Request(
    incarnation=INCARNATION,
    id=123456,
    path="/v1/chat/completions",
    stream=True,
    headers={"content-type": "application/json", "x-request-id": "5b1d3c9e"},
)


def test_encode_a_request(benchmark: BenchmarkFixture) -> None:
    benchmark.group = "wire message"
    benchmark(wire.encode, REQUEST)


def test_decode_a_request(benchmark: BenchmarkFixture) -> None:
    benchmark.group = "wire message"
    frame = wire.encode(REQUEST)
    assert benchmark(wire.decode, wire.data_to_engine, frame) == REQUEST


def test_decode_a_load_report(benchmark: BenchmarkFixture) -> None:
    benchmark.group = "wire message"
    report = wire.Load(INCARNATION, running=12, waiting=3, waiting_tokens=4711, kv_permille=512)
    frame = wire.encode(report)
    assert benchmark(wire.decode, wire.load, frame) == report


# -- a step: the deltas of 128 streams in one message -------------------------------------------------------

EVENT = (
    b'data: {"id":"chatcmpl-5b1d3c9e","object":"chat.completion.chunk",'
    b'"choices":[{"index":0,"delta":{"content":" fox"}}]}\n\n'
)
STEP: list[Any] = [
    wire.STEP_TAG,
    INCARNATION,
    [[request, 17, wire.CHUNK, EVENT] for request in range(100_000, 100_128)],
]


class Delta(msgspec.Struct, array_like=True, gc=False):
    id: int
    sequence: int
    kind: int
    data: bytes


class TypedStep(msgspec.Struct, array_like=True, tag=wire.STEP_TAG):
    incarnation: bytes
    deltas: list[Delta]


ENCODE: dict[str, Callable[[Any], bytes]] = {"msgspec": msgspec.msgpack.Encoder().encode, "msgpack": msgpack.packb}
DECODE: dict[str, Callable[[bytes], Any]] = {
    "msgspec, plain lists": msgspec.msgpack.Decoder().decode,
    "msgspec, structs": msgspec.msgpack.Decoder(TypedStep).decode,
    "msgpack": msgpack.unpackb,
}


@pytest.mark.parametrize("codec", ENCODE)
def test_encode_a_step(benchmark: BenchmarkFixture, codec: str) -> None:
    benchmark.group = "encode a step of 128 deltas"
    assert benchmark(ENCODE[codec], STEP) == wire.encode(STEP)


@pytest.mark.parametrize("codec", DECODE)
def test_decode_a_step(benchmark: BenchmarkFixture, codec: str) -> None:
    benchmark.group = "decode a step of 128 deltas"
    benchmark(DECODE[codec], wire.encode(STEP))
