"""An ASGI application's answer to one request, as a stream of messages.

Owns the two ends that an ASGI server would have: `receive` gives the body and later the disconnect, `send`
collects. Knows neither the application nor who reads the stream. Invariant: when the stream is over, for
whatever reason, the application's call has ended, too; one whose reader leaves is told so as by a client that
disconnects, then cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message

from gqa_serve.deploy.http_request import HttpRequest

_LEAVE_S = 1.0  # what an application gets to notice that its client left, before it is cancelled


async def answer_messages(app: ASGIApp, request: HttpRequest) -> AsyncGenerator[list[Message], None]:
    """Lists of what the application sent meanwhile; first an empty one: the request was taken.

    Raises what the application raises.
    """
    sent: list[Message] = []
    wake, gone = asyncio.Event(), asyncio.Event()
    body_given = False

    async def receive() -> Message:
        nonlocal body_given
        if not body_given:
            body_given = True
            return {"type": "http.request", "body": request.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        wake.set()

    # A scope of its own: the application writes into it.
    call = asyncio.ensure_future(app(dict(request.scope), receive, send))
    call.add_done_callback(lambda _: wake.set())
    try:
        yield []
        while True:
            wake.clear()
            if sent:
                batch = sent.copy()
                sent.clear()
                yield batch
            elif call.done():
                break
            else:
                await wake.wait()
        call.result()
    finally:
        gone.set()
        if not call.done():
            await asyncio.wait({call}, timeout=_LEAVE_S)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)


async def whole_answer(app: ASGIApp, request: HttpRequest) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body. Raises what the application raises."""
    status, headers, parts = 500, [], []
    async for messages in answer_messages(app, request):
        for message in messages:
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))
    return status, headers, b"".join(parts)
