"""The inference routes: what is forwarded, what is refused, what the client sees, and when it leaves.

Each rule holds on both ways that a request may go: around ASGI, and over it.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from broker.config import Models, Server
from broker.counters import CounterColumn, TotalColumn
from broker.errors import UpstreamBroken
from frontend.answer import PAUSE_AT
from frontend.api import Inference
from tests.frontend import asgi
from tests.frontend.fakes import Frontend
from tests.frontend.wire import PATHS, Exchange, Path, Wire, ask

A, B = "http://10.0.0.1:80", "http://10.0.0.2:80"
CHAT_PATH = "/v1/chat/completions"
CHAT = b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}'
SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]


@pytest.fixture
def frontend(tmp_path: pathlib.Path) -> Iterator[Frontend]:
    with Frontend(tmp_path, A, B, models=Models(aliases={"gpt": "tiny"}), server=Server(max_body_bytes=4096)) as it:
        yield it


class Site:
    """A frontend that is reached the one way or the other. Within a running loop."""

    def __init__(self, frontend: Frontend, path: Path) -> None:
        self.inference = Inference(frontend.config, frontend.forwarder)
        self.frontend = frontend
        self.path = path

    def __call__(self) -> Wire:
        """A new connection."""
        return Wire(self.frontend, self.path, self.inference)


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def site(frontend: Frontend, path: Path) -> Site:
    return Site(frontend, path)


async def asked(site: Site, path: str, *parts: bytes, **fields: Any) -> Exchange:
    return await ask(site(), path, *parts, **fields)


def idle(frontend: Frontend) -> bool:
    return not any(frontend.in_flight) and not frontend.forwarder.live


# -- what is forwarded -----------------------------------------------------------------------------------------


def test_the_body_is_forwarded_byte_for_byte(frontend: Frontend, site: Site) -> None:
    odd = b'{ "n" : 123456789012345678901234567890, "model":"tiny",\n"x":1.0e0, "unknown": [ ] }'

    async def run() -> Exchange:
        async with Exchange(site(), "/v1/chat/completions", odd[:10], odd[10:], query=b"beta=1") as exchange:
            call = frontend.http.last
            assert (call.request.body, call.request.path) == (odd, "/v1/chat/completions?beta=1")
            call.answer(b'{"ok":', b"true}", headers=[(b"content-length", b"11")])
        return exchange

    exchange = asyncio.run(run())
    assert (exchange.status, exchange.body, exchange.complete) == (200, b'{"ok":true}', True)
    assert exchange.headers["content-length"] == "11"
    assert idle(frontend)


def test_an_alias_changes_the_models_name_and_nothing_else(frontend: Frontend, site: Site) -> None:
    async def run() -> None:
        async with Exchange(site(), "/v1/completions", b'{ "prompt":"a" , "model" : "gpt", "n":1e0}'):
            assert frontend.http.last.request.body == b'{ "prompt":"a" , "model" : "tiny", "n":1e0}'
            frontend.http.last.answer(b"{}")

    asyncio.run(run())


def test_headers_of_the_connection_stay_behind(frontend: Frontend, site: Site) -> None:
    sent = [
        (b"host", b"router"),
        (b"connection", b"keep-alive, X-Mine"),
        (b"x-mine", b"1"),
        (b"keep-alive", b"5"),
        (b"te", b"trailers"),
        (b"transfer-encoding", b"chunked"),
        (b"expect", b"100-continue"),
        (b"authorization", b"Bearer key"),
        (b"x-request-id", b"mine-1"),
        (b"x-twice", b"a"),
        (b"x-twice", b"b"),
    ]

    async def run() -> Exchange:
        async with Exchange(site(), "/v1/chat/completions", CHAT, headers=sent) as exchange:
            assert frontend.http.last.request.headers == [
                (b"authorization", b"Bearer key"),
                (b"x-twice", b"a"),
                (b"x-twice", b"b"),
                (b"x-request-id", b"mine-1"),
            ]
            answer = [(b"connection", b"close"), (b"date", b"then"), (b"x-request-id", b"theirs"), (b"x-kept", b"1")]
            frontend.http.last.answer(b"{}", headers=answer)
        return exchange

    assert asyncio.run(run()).answers.pairs == [
        (b"x-kept", b"1"),
        (b"x-request-id", b"mine-1"),
        (b"transfer-encoding", b"chunked"),
    ]


@pytest.mark.parametrize("theirs", [b"", b"a b", b"x" * 300, b'"><script>', b"a\tb"])
def test_a_request_id_that_could_do_harm_is_replaced(frontend: Frontend, site: Site, theirs: bytes) -> None:
    async def run() -> Exchange:
        async with Exchange(site(), "/v1/chat/completions", CHAT, headers=[(b"x-request-id", theirs)]) as exchange:
            frontend.http.last.answer(b"{}")
        return exchange

    made = asyncio.run(run()).headers["x-request-id"]
    assert len(made) == 24
    assert frontend.http.last.request.headers == [(b"x-request-id", made.encode())]


def test_multipart_is_forwarded_unread(frontend: Frontend, site: Site) -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nother\r\n--b--'

    async def run() -> None:
        kind = [(b"content-type", b"multipart/form-data; boundary=b")]
        async with Exchange(site(), "/v1/audio/transcriptions", body, headers=kind):
            assert frontend.http.last.request.body == body
            frontend.http.last.answer(b"{}")

    asyncio.run(run())


def test_prompt_tokens_are_counted_while_the_request_runs(frontend: Frontend, site: Site) -> None:
    async def run() -> None:
        async with Exchange(site(), "/v1/completions", b'{"prompt": [1, 2, 3, 4, 5]}'):
            slot = frontend.slots[frontend.http.last.instance.url]
            assert frontend.run.reader.counters.in_flight(slot) == (1, 5)
            frontend.http.last.answer(b"{}")
            assert frontend.run.reader.counters.in_flight(slot) == (0, 0)

    asyncio.run(run())


# -- what is refused -------------------------------------------------------------------------------------------

BAD = [
    (b"", None),
    (b"hello", None),
    (b"[]", None),
    (b"1", None),
    (b'"text"', None),
    (b"null", None),
    (b'{"model": "tiny"', None),
    (b'{"model": "tiny"} {}', None),
    (b'{"model": NaN}', None),
    (b'{"x": Infinity}', None),
    (b'{"model": "\xff"}', None),
    (b"\xef\xbb\xbf{}", None),
    (b'{"a":' * 5000, None),
    (b'{"model": 1}', "model"),
    (b'{"model": ["tiny"]}', "model"),
    (b'{"model": {"name": "tiny"}}', "model"),
    (b'{"model": true}', "model"),
    pytest.param(b'{"model": "%b"}' % (b"m" * 1025), "model", id="a model as long as it likes"),
    (b'{"stream": "true"}', "stream"),
    (b'{"stream": 1}', "stream"),
    (b'{"stream": []}', "stream"),
    (b'{"stream": {}}', "stream"),
]


@pytest.mark.parametrize(("body", "param"), BAD)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank"])
def test_a_bad_body_is_refused_in_the_apis_form(
    tmp_path: pathlib.Path, path: Path, body: bytes, param: str | None, route: str
) -> None:
    with Frontend(tmp_path, A) as frontend:
        exchange = asyncio.run(asked(Site(frontend, path), route, body))
        assert exchange.status == 400
        error = exchange.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert error["message"]
        assert exchange.headers["content-type"] == "application/json"
        assert exchange.headers["x-request-id"]
        assert frontend.http.calls == []
        assert frontend.total(TotalColumn.REJECTED) == frontend.total(TotalColumn.RESPONSES_4XX) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"model": null, "stream": null}',
        b'{"messages": "text"}',
        b'{"messages": [1, null, "x", {"content": 5}, {"content": [{"type": "image_url"}, {"text": "t"}, 7]}]}',
        b'{"prompt": {"a": [{}]}}',
        b'{"prompt": [[1, 2], [3]]}',
        b'{"input": ["a", "b"]}',
        b'{"messages": 1e999}',
        b'{"messages": [{"content": "cut \\ud83d"}]}',
        b'{"session_id": 5}',
        b'{"session_id": {"a": 1}}',
    ],
)
def test_what_only_an_engine_can_judge_is_forwarded(frontend: Frontend, site: Site, body: bytes) -> None:
    async def run() -> None:
        async with Exchange(site(), "/v1/chat/completions", body):
            assert frontend.http.last.request.body == body
            frontend.http.last.answer(b"{}")

    asyncio.run(run())


def test_a_body_that_says_it_is_too_large_is_not_even_read(frontend: Frontend, site: Site) -> None:
    async def run() -> Exchange:
        async with Exchange(site(), headers=[(b"content-length", b"4097")]) as exchange:
            assert exchange.status == 413
        return exchange

    assert asyncio.run(run()).json()["error"]["code"] == "body_too_large"
    assert frontend.total(TotalColumn.REJECTED) == 1


def test_a_body_that_grows_too_large_is_refused_while_it_is_read(frontend: Frontend, site: Site) -> None:
    async def run() -> Exchange:
        chunked = [(b"transfer-encoding", b"chunked")]
        async with Exchange(site(), "/v1/rerank", *[b"x" * 1024] * 4, headers=chunked, whole=False) as exchange:
            assert exchange.answers.status == 0
            await exchange.part(b"x")
            assert exchange.status == 413
            await exchange.part(b"x")
            exchange.wire.feed(b"0\r\n\r\n")
            assert not exchange.wire.transport.is_closing()
        return exchange

    asyncio.run(run())
    assert frontend.http.calls == []


def test_a_body_of_exactly_the_limit_is_taken(frontend: Frontend, site: Site) -> None:
    body = b'{"prompt": "%s"}' % (b"x" * (4096 - 14))

    async def run() -> Exchange:
        async with Exchange(site(), "/v1/completions", body, headers=[(b"content-length", b"4096")]) as exchange:
            frontend.http.last.answer(b"{}")
        return exchange

    assert len(body) == 4096
    assert asyncio.run(run()).status == 200


def test_no_instance_is_a_503_that_says_when_to_come_again(tmp_path: pathlib.Path, path: Path) -> None:
    with Frontend(tmp_path) as frontend:
        exchange = asyncio.run(asked(Site(frontend, path), "/v1/chat/completions", CHAT))
        assert (exchange.status, exchange.headers["retry-after"]) == (503, "1")
        assert exchange.json()["error"]["code"] == "no_instance"


def test_an_unknown_model_is_a_404_as_openai_says_it(site: Site) -> None:
    exchange = asyncio.run(asked(site, "/v1/chat/completions", b'{"model": "other"}'))
    assert exchange.status == 404
    error = exchange.json()["error"]
    assert (error["code"], error["param"], error["type"]) == ("model_not_found", "model", "invalid_request_error")


# -- streams ---------------------------------------------------------------------------------------------------


def test_chunks_that_arrive_together_go_out_together_and_others_at_once(frontend: Frontend, site: Site) -> None:
    async def run() -> Exchange:
        async with Exchange(site(), "/v1/chat/completions", CHAT) as exchange:
            sink = frontend.http.last.sink
            sink.start(200, SSE)
            sink.write(b"data: 1\n\n")
            sink.write(b"data: 2\n\n")
            await exchange.turns()
            assert exchange.pieces == [b"data: 1\n\ndata: 2\n\n"]
            assert len(exchange.wire.transport.pieces) == 1, "the head goes with them"
            sink.write(b"data: 3\n\n")
            await exchange.turns()
            assert exchange.pieces[1:] == [b"data: 3\n\n"]
            sink.write(b"data: [DONE]\n\n")
            sink.finish()
        return exchange

    exchange = asyncio.run(run())
    assert exchange.body == b"data: 1\n\ndata: 2\n\ndata: 3\n\ndata: [DONE]\n\n"
    assert len(exchange.wire.transport.pieces) == 3, "the end goes with the last ones"
    assert exchange.complete


@pytest.mark.parametrize(
    ("written", "cut"), [(b"data: 1\n\n", b""), (b"data: 1\r\n\r\n", b""), (b'data: {"a', b"\n\n")]
)
def test_a_stream_that_breaks_ends_with_an_error_event(
    frontend: Frontend, site: Site, written: bytes, cut: bytes
) -> None:
    async def run() -> Exchange:
        async with Exchange(site(), "/v1/chat/completions", CHAT) as exchange:
            sink = frontend.http.last.sink
            sink.start(200, SSE)
            sink.write(written)
            await exchange.turns()
            sink.fail(UpstreamBroken("the engine died"))
        return exchange

    exchange = asyncio.run(run())
    assert exchange.complete
    rest = exchange.body.removeprefix(written + cut)
    assert rest.startswith(b"data: ")
    assert rest.endswith(b"\n\n")
    assert json.loads(rest[6:])["error"]["message"] == "the engine died"
    assert b"[DONE]" not in exchange.body
    assert idle(frontend)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-type", b"application/json")],
        [(b"content-type", b"application/json"), (b"content-length", b"100")],
        [*SSE, (b"content-encoding", b"gzip")],
        [*SSE, (b"content-length", b"100")],
    ],
)
def test_another_answer_that_breaks_is_cut_off_so_that_it_cannot_look_whole(
    frontend: Frontend, site: Site, headers: list[tuple[bytes, bytes]]
) -> None:
    async def run() -> Exchange:
        async with Exchange(site(), "/v1/chat/completions", CHAT) as exchange:
            sink = frontend.http.last.sink
            sink.start(200, headers)
            sink.write(b'{"half":')
            sink.fail(UpstreamBroken("the engine died"))
        return exchange

    exchange = asyncio.run(run())
    assert exchange.body == b'{"half":'
    assert not exchange.complete
    assert exchange.wire.transport.lost


# -- leaving ---------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_before_the_first_byte_is_seen_at_once(frontend: Frontend, site: Site) -> None:
    async def run() -> Exchange:
        async with Exchange(site(), "/v1/chat/completions", CHAT) as exchange:
            assert sum(frontend.in_flight) == 1
            exchange.leave()
            await exchange.turns()
            assert frontend.http.last.cancelled
            assert exchange.wire.transport.lost
            assert not exchange.wire.state.tasks
        return exchange

    assert asyncio.run(run()).wire.out == b""
    assert idle(frontend)
    assert frontend.counted(CounterColumn.GONE) == 1


def test_a_client_that_leaves_in_the_middle_of_a_stream_is_seen_at_once(frontend: Frontend, site: Site) -> None:
    async def run() -> None:
        async with Exchange(site(), "/v1/chat/completions", CHAT) as exchange:
            frontend.http.last.sink.start(200, SSE)
            frontend.http.last.sink.write(b"data: 1\n\n")
            await exchange.turns()
            exchange.leave()
            await exchange.turns()
            assert frontend.http.last.cancelled
            assert exchange.wire.transport.lost
            assert not exchange.wire.state.tasks

    asyncio.run(run())
    assert idle(frontend)


def test_a_client_that_leaves_before_its_body_is_whole_leaves_nothing(frontend: Frontend, site: Site) -> None:
    async def run() -> None:
        async with Exchange(site(), "/v1/chat/completions", b'{"model":', whole=False) as exchange:
            exchange.leave()

    asyncio.run(run())
    assert frontend.http.calls == []
    assert idle(frontend)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_request_that_the_server_gives_up_releases_what_it_held(frontend: Frontend, streaming: bool) -> None:
    async def run() -> None:
        async with asgi.Exchange(Inference(frontend.config, frontend.forwarder), CHAT_PATH, CHAT) as exchange:
            if streaming:
                frontend.http.last.sink.start(200, SSE)
                frontend.http.last.sink.write(b"data: 1\n\n")
                await exchange.turns()
            exchange.cancel()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert frontend.http.last.cancelled
    assert idle(frontend)


# -- back-pressure ---------------------------------------------------------------------------------------------


def test_a_client_that_does_not_keep_up_pauses_its_instance_until_it_does(frontend: Frontend, site: Site) -> None:
    async def run() -> Exchange:
        async with Exchange(site(), CHAT_PATH, CHAT) as exchange:
            call = frontend.http.last
            call.sink.start(200, SSE)
            call.sink.write(b"first")
            await exchange.turns()
            exchange.wire.transport.stick()
            written = 0
            while not call.paused and written < 4 * PAUSE_AT:
                call.sink.write(b"x" * 1024)
                written += 1024
                await exchange.turns()
            assert call.paused
            assert written <= 2 * PAUSE_AT + 2048  # in the transport, and in what waits for it
            exchange.wire.transport.flow()
            await exchange.turns()
            assert not call.paused
            call.sink.finish()
            await exchange.turns()
            assert exchange.body == b"first" + b"x" * written
        return exchange

    assert asyncio.run(run()).complete


@pytest.mark.parametrize("how", ["end", "reset"])
def test_a_client_that_leaves_while_it_is_slow_is_seen(frontend: Frontend, site: Site, how: str) -> None:
    async def run() -> None:
        async with Exchange(site(), CHAT_PATH, CHAT) as exchange:
            frontend.http.last.sink.start(200, SSE)
            exchange.wire.transport.stick()
            for _ in range(3):
                frontend.http.last.sink.write(b"x" * (PAUSE_AT + 1))
                await exchange.turns()
            assert exchange.wire.transport.reads
            getattr(exchange.wire.transport, how)()
            await exchange.turns()
            assert frontend.http.last.cancelled
            assert idle(frontend)
            assert exchange.wire.transport.lost

    asyncio.run(run())
