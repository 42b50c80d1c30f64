"""Many streams of native engines at once, as in the scenario `lock500`, for a profiler that counts instructions:

    PYTHONPATH=build/compiled:. valgrind --tool=callgrind --toggle-collect='CPyPy_zmq_peers___Peer___data_received' \\
      --toggle-collect='CPyPy_zmq___ZmqUpstream____turn' .venv/bin/python -P -m benchmarks.guard.streams 24

What an event costs, from an engine's bytes to the client's, is the difference of two runs of different length. The
functions named are those of the compiled build.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.guard import whole
from benchmarks.test_lean import product_log
from broker import wire
from broker.banner import is_compiled
from broker.zmtp import head
from frontend.upstream.zmq_peers import Peer

STREAMS = 125
"""Of each engine."""
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'


def main(steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with product_log(Path(folder)), whole.frontend(Path(folder), native=True) as it:
            streams: dict[Peer, list[int]] = {}
            clients: list[whole.Transport] = []
            for _ in range(whole.INSTANCES * STREAMS):
                it.join()
                clients.append(it.client)
                engine = it.ask(whole.request(whole.STREAMED))
                assert isinstance(engine, Peer)
                streams.setdefault(engine, []).append(it.native._next_id)
            said = [[(engine, _step(ids, number)) for engine, ids in streams.items()] for number in range(steps)]
            before = time.process_time()
            for step in said:
                for engine, data in step:
                    engine.data_received(data)
                it.turn()
            took = time.process_time() - before
            events = sum(len(client.sent) for client in clients)
            assert events == steps * len(clients), events
        print(f"{events} events, compiled: {is_compiled()}, {took / events * 1e6:.2f} us each")


def _step(ids: list[int], number: int) -> bytes:
    frame = wire.encode([wire.STEP_TAG, whole.INCARNATION, [[ident, number, wire.CHUNK, EVENT] for ident in ids]])
    return head(len(frame)) + frame


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
