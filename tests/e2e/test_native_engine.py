"""An engine written from docs/wire.md alone, behind the whole of Penstock: its metadata and its answers."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator

import msgpack
import pytest

from broker import config
from broker.types import Role
from broker.view import TableReader
from tests.support import raw_engine
from tests.support.client import Client, chat
from tests.support.processes import Fleet

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("native")) as fleet:
        engine = fleet.program("raw", [raw_engine.__file__, fleet.url, "--model", "raw"])
        fleet.await_instances(1)
        yield fleet
        engine.signal(15)
        assert engine.await_exit() == 0


def test_the_metadata_is_what_the_issue_is_about() -> None:
    """Nested, binary, 6 KiB."""
    transfer = raw_engine.transfer_metadata()
    assert 6 * 1024 <= len(transfer) <= 7 * 1024
    tree = msgpack.unpackb(transfer)
    assert isinstance(tree["rdma"][3]["gid"], bytes)
    assert tree["nccl"]["ranks"][7] == {"rank": 7, "address": ["10.0.0.1", 7007]}


def test_it_arrives_byte_equal_in_shared_memory(fleet: Fleet) -> None:
    reader = TableReader.attach(fleet.run_dir, config.parse((fleet.run_dir / "config.json").read_bytes()))
    view = reader.view(Role.MIXED, "raw")
    assert reader.instance(int(view.slots[0])).transfer == raw_engine.transfer_metadata()
    reader.close()


def test_it_is_shown_byte_equal_by_every_frontend(fleet: Fleet) -> None:
    for _ in range(8):  # whichever accepts
        (instance,) = fleet.instances()
        assert base64.b64decode(instance["transfer"]["base64"]) == raw_engine.transfer_metadata()


def test_it_still_is_after_the_scheduler_was_replaced(fleet: Fleet) -> None:
    epoch = fleet.get("/instances")[1]["scheduler"]["epoch"]
    fleet.await_replaced("scheduler", fleet.kill("scheduler"))
    (instance,) = fleet.await_instances(1)
    assert base64.b64decode(instance["transfer"]["base64"]) == raw_engine.transfer_metadata()
    assert fleet.get("/instances")[1]["scheduler"]["epoch"] >= epoch


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_it_answers_a_chat_with_what_it_was_asked(fleet: Fleet, stream: bool) -> None:
    body = json.dumps(chat("Hello", stream=stream, model="raw", seed=12345678901234567890), indent=3).encode()

    async def ask() -> None:
        with Client(fleet.port) as client:
            exchange = await client.ask(CHAT, body)
        assert exchange.whole
        assert exchange.text() == " ".join(raw_engine.words_of(CHAT, body, b""))
        assert ("event-stream" in exchange.headers["content-type"]) == stream

    asyncio.run(ask())
    fleet.await_idle()
