"""`X-Request-Id`: the name under which a client, its proxies and the log speak of one request.

Owns which ids are taken over from clients and that every response carries one, and a header that keeps
browsers from guessing another type than its own. Knows nothing of what is answered. Invariant: an id is at
most `MAX_CHARS` printable ASCII characters without spaces, so that it breaks neither log lines nor headers.
"""

from __future__ import annotations

import logging
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_CHARS = 128
HEADER = "x-request-id"

logger = logging.getLogger(__name__)


def client_request_id(scope: Scope) -> str | None:
    """The id that the client gave, if it can be used."""
    for name, value in scope["headers"]:
        if name == HEADER.encode():
            return value.decode() if 0 < len(value) <= MAX_CHARS and _plain(value) else None
    return None


def _plain(value: bytes) -> bool:
    return all(0x21 <= byte <= 0x7E for byte in value)


class RequestIds:
    """Puts an id on every response: the client's, else the endpoint's own, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = client_request_id(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault(
                    "x-content-type-options", "nosniff"
                )  # nothing here is what it is not called
                if given is not None:
                    headers[HEADER] = given
                else:
                    headers.setdefault(HEADER, f"req-{uuid.uuid4().hex}")
            await send(message)

        await self._app(scope, receive, send_with_id)
