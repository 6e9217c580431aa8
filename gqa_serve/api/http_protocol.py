"""`HttpProtocol`: uvicorn's HTTP/1.1 connection, with two things an application cannot do for itself.

Owns the answer to bytes that are no HTTP request (JSON, like every other error) and the way for a response
to drop its connection at once: closing waits until the client has read what was written, which a client that
stopped reading never does. Knows no routes. Pass it as `uvicorn.Config(http=HttpProtocol)`. Invariant: under
any other server `abort_connection` does nothing and says so.
"""

from __future__ import annotations

from starlette.types import Receive, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gqa_serve.api.errors import error_json
from gqa_serve.errors import RequestError

ABORT_EXTENSION = "gqa_serve.abort"  # in the ASGI scope's extensions


class HttpProtocol(HttpToolsProtocol):
    """One connection of uvicorn's httptools implementation."""

    def on_message_begin(self) -> None:
        """A request begins: its scope learns how to abort the connection."""
        super().on_message_begin()
        self.scope["extensions"] = {ABORT_EXTENSION: {"abort": self.transport.abort}}

    def send_400_response(self, msg: str) -> None:
        """The answer to malformed HTTP; nothing after it can be understood, so the connection closes."""
        if self.cycle is None or self.cycle.response_complete:
            body = error_json(RequestError(f"{msg} Send HTTP/1.1.", code="invalid_http"))
            head = (
                "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode("ascii") + body)
        # Else the answer to an earlier request is being written: a second head inside it would corrupt it.
        self.transport.close()


async def abort_connection(scope: Scope, receive: Receive) -> bool:
    """Drop the connection without waiting for what is still unsent; returns whether the server can."""
    extension = scope.get("extensions", {}).get(ABORT_EXTENSION)
    if extension is None:
        return False
    extension["abort"]()
    while (await receive())["type"] != "http.disconnect":  # then uvicorn knows, and expects no more of us
        pass
    return True
