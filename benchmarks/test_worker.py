"""The engine's side: what a step of the model costs, and what it buys to send a step as one message.

`test_emission` is the reason for the outbox: 128 deltas in one ZMQ message against 128 messages, through real sockets.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq
from pytest_benchmark.fixture import BenchmarkFixture

from broker import wire
from broker.worker.answer import Answer
from broker.worker.outbox import Outbox
from broker.worker.sim.model import Model, Speeds

INCARNATION = bytes(range(16, 32))
DELTAS = 128
EVENT = b'data: {"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" word"}]}\n\n'


@pytest.mark.parametrize("sequences", [8, 128])
def test_model_step(benchmark: BenchmarkFixture, sequences: int) -> None:
    """One decode step of a full batch; what is over is submitted anew, as a busy engine's queue does."""
    model = Model(Speeds(batch=sequences, kv_blocks=100_000))
    numbers = iter(range(10**9))

    def submit() -> None:
        number = next(numbers)
        model.submit(number, range(number, number + 256), range(number, number + 256), 0.0)

    for _ in range(sequences):
        submit()

    def step() -> None:
        taken = model.step(0.0)
        assert taken is not None
        for _ in taken.finished:
            submit()

    benchmark(step)


def test_event_of_a_token(benchmark: BenchmarkFixture) -> None:
    """A text delta made into a ready SSE event."""
    answer = Answer("/v1/chat/completions", {"model": "m"}, stream=True, id="1", created=0)
    answer.text("first")
    benchmark(answer.text, " word")


@pytest.fixture
def pair() -> Iterator[tuple[zmq.Socket[bytes], zmq.Socket[bytes], bytes]]:
    """An engine's ROUTER, a frontend's DEALER that reads it, and the frontend's name."""
    context = zmq.Context()
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for socket in (router, dealer):
        socket.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    dealer.connect(f"tcp://127.0.0.1:{port}")
    dealer.send(b"")
    name, _ = router.recv_multipart()
    yield router, dealer, name
    router.close()
    dealer.close()
    context.term()


@pytest.mark.parametrize("messages", ["one per step", "one per delta"])
def test_emission(
    benchmark: BenchmarkFixture, pair: tuple[zmq.Socket[bytes], zmq.Socket[bytes], bytes], messages: str
) -> None:
    """From 128 deltas at the engine to 128 deltas decoded at the frontend."""
    router, dealer, name = pair
    outbox = Outbox(INCARNATION)
    decode = wire.msgspec.msgpack.Decoder(list).decode
    sequence = iter(range(10**9))

    def send(message: bytes) -> bool:
        router.send_multipart([name, message], zmq.DONTWAIT)
        return True

    def step() -> None:
        each = messages == "one per delta"
        number = next(sequence)
        for request in range(DELTAS):
            outbox.put((request, number, wire.CHUNK, EVENT))
            if each:
                outbox.flush(send)
        outbox.flush(send)
        read = 0
        while read < DELTAS:
            read += len(decode(dealer.recv())[2])

    benchmark(step)
