"""A client's answer over ASGI, by itself."""

from __future__ import annotations

import asyncio

from starlette.types import Message

from broker.faces import FD_ROUTER
from frontend.answer import Answer
from frontend.errors import Stopping


def test_an_error_that_ends_several_requests_says_each_ones_own_things() -> None:
    """It is sent later than it is heard, when another request may have heard it."""
    error = Stopping("stops")
    answers = {name: Answer(b"", face=FD_ROUTER) for name in ("one", "two")}
    for name, answer in answers.items():
        error.request_id, error.headers = name, ((b"x-router-prefill-url", name.encode()),)
        answer.fail(error)

    async def run() -> None:
        for name, answer in answers.items():
            sent: list[Message] = []

            async def send(message: Message, sent: list[Message] = sent) -> None:
                sent.append(message)

            await answer._send_all(send)
            head, body = sent
            assert (b"x-router-prefill-url", name.encode()) in head["headers"]
            assert b'"request_id": "%b"' % name.encode() in body["body"]

    asyncio.run(run())
