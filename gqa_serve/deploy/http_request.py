"""`HttpRequest`: one HTTP request as plain values, so that it can be sent to another process.

Owns how it is read from an ASGI server, body included, and which words of its scope travel. Knows no routes
and no Ray. Invariant: no more than `max_body_bytes` of a body (and the chunk that goes beyond) is held; what
is larger travels short, and the application, which sees the announced or the actual length, refuses it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

DECLINED_BY = "declined_by"  # in the one message that comes instead of an answer: the replica's name

_SCOPE_KEYS = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
    "client",
    "server",
)


@dataclasses.dataclass(frozen=True)
class HttpRequest:
    """What the application gets; the rest is for whoever chooses an engine.

    `prefix_keys`: see `prefix_keys.py`. `declined_by`: names of replicas that had no engine for it just now.
    """

    scope: dict[str, Any]
    body: bytes
    prefix_keys: tuple[bytes, ...] = ()
    declined_by: tuple[str, ...] = ()


def portable_scope(scope: Scope) -> dict[str, Any]:
    """The scope without what belongs to the process that received it."""
    return {key: scope[key] for key in _SCOPE_KEYS if key in scope}


async def read_body(scope: Scope, receive: Receive, max_body_bytes: int) -> bytes:
    """The body, cut where it is known to be too large. Raises ClientDisconnect."""
    announced = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > max_body_bytes):
        return b""
    parts: list[bytes] = []
    size, more = 0, True
    while more and size <= max_body_bytes:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size += len(part)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)
