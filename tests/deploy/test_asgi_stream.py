"""An application's answer as a stream of messages: complete, in order, and over when its reader leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gqa_serve.deploy.asgi_stream import answer_messages, whole_answer
from gqa_serve.deploy.http_request import HttpRequest, portable_scope, read_body


def request(body: bytes = b"", **scope: Any) -> HttpRequest:
    base = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    return HttpRequest({**base, **scope}, body)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await Response(body[::-1], 201, {"x-length": str(len(body))})(scope, receive, send)


async def parts(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for number in range(3):
        await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"!"})


def test_everything_comes_in_order_after_the_mark_that_it_was_taken() -> None:
    async def run() -> list[list[Message]]:
        return [batch async for batch in answer_messages(parts, request())]

    first, *rest = asyncio.run(run())
    assert first == []
    assert len(rest) > 1
    messages = [message for batch in rest for message in batch]
    assert messages[0]["type"] == "http.response.start"
    assert b"".join(message["body"] for message in messages[1:]) == b"012!"


def test_a_whole_answer() -> None:
    status, headers, body = asyncio.run(whole_answer(echo, request(b"abc")))
    assert (status, dict(headers)[b"x-length"], body) == (201, b"3", b"cba")


def test_the_application_does_not_write_into_the_request() -> None:
    async def writes(scope: Scope, receive: Receive, send: Send) -> None:
        scope["mark"] = True
        await parts(scope, receive, send)

    asked = request()
    asyncio.run(whole_answer(writes, asked))
    assert "mark" not in asked.scope


def test_its_exception_comes_after_what_it_sent() -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("planted")

    async def run() -> None:
        batches = answer_messages(fails, request())
        assert await anext(batches) == []
        assert [message["type"] for message in await anext(batches)] == ["http.response.start"]
        with pytest.raises(ValueError, match="planted"):
            await anext(batches)

    asyncio.run(run())


def test_one_whose_reader_leaves_sees_a_client_that_left() -> None:
    seen: list[str] = []

    async def listens(scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            seen.append(message["type"])
            if message["type"] == "http.disconnect":
                return

    async def run() -> None:
        batches = answer_messages(listens, request())
        await anext(batches)
        await asyncio.sleep(0)
        await batches.aclose()

    asyncio.run(run())
    assert seen == ["http.request", "http.disconnect"]


def test_one_that_does_not_listen_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqa_serve.deploy.asgi_stream._LEAVE_S", 0.01)
    ended = []

    async def busy(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def run() -> None:
        reading = asyncio.ensure_future(whole_answer(busy, request()))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.get_running_loop().shutdown_asyncgens()
        assert ended == [True]

    asyncio.run(run())


def receiving(*messages: Message) -> Receive:
    left = list(messages)

    async def receive() -> Message:
        return left.pop(0)

    return receive


def body_of(receive: Receive, headers: list[tuple[bytes, bytes]] | None = None, limit: int = 10) -> bytes:
    return asyncio.run(read_body({"type": "http", "headers": headers or []}, receive, limit))


def test_a_body_is_read_whole() -> None:
    chunks = [
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.request", "body": b"cd"},
    ]
    assert body_of(receiving(*chunks)) == b"abcd"


def test_a_body_that_is_too_large_is_not() -> None:
    endless = {"type": "http.request", "body": b"x" * 6, "more_body": True}
    assert body_of(receiving(endless, endless)) == b"x" * 12  # one byte too many is enough for a 413
    assert body_of(receiving(), [(b"content-length", b"11")]) == b""
    assert body_of(receiving(), [(b"content-length", b"9" * 5000)]) == b""


def test_a_client_that_leaves_while_it_sends() -> None:
    with pytest.raises(ClientDisconnect):
        body_of(
            receiving({"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.disconnect"})
        )


def test_what_belongs_to_the_process_stays_there() -> None:
    scope = {"type": "http", "path": "/v1", "headers": [], "app": object(), "state": {}}
    assert portable_scope(scope) == {"type": "http", "path": "/v1", "headers": []}
